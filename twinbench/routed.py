"""One forward for a batch whose samples have different routes, without building any merged weights.

Twin-Merging's Eq. 3 moves from the weights to the activations: for a linear layer and the factors of each exclusive
part ``y = W_s x + b_s + sum_t w_t (L_t (R_t x) + b_t)``; an embedding gathers rows of L_t instead; the vectors of norm
layers are mixed per sample. `attach` adds this to a model by forward hooks, so its modules, names and state dict stay
those of the shared expert.

The factors of a layer lie one expert after the other, so that any range of experts is a slice. A batch is covered by
*blocks*, and a block costs two matrix products: one block covers everything where most weights count; a near-one-hot
batch has groups of as many samples for each expert, and takes about one expert's products per sample.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinbench.compress import LowRank, Part, dense
from twinbench.routes import Block, Routes


@contextmanager
def attach(model: nn.Module, exclusive: Mapping[str, Mapping[str, Part]], tolerance: float = 0.0) -> Iterator[Routes]:
    """Let ``model``, which holds the shared weights, add the exclusive parts while the context lasts.

    Args:
        exclusive: per expert, parts by parameter name of ``model``; a part of a tied parameter acts wherever it is
            tied. The experts' order is that of the weights.
        tolerance: of the matrices and biases of linear layers and embeddings, those whose weight for a sample is at
            most this may be dropped for it: the weight dropped from a sample is at most ``len(exclusive) *
            tolerance``. 0 is exact.

    Yields:
        Routes: set its ``weights`` before a forward or a generation. The batch in the model must be theirs, or a
            multiple that repeats each sample in a row.

    Raises:
        ValueError: a part has no parameter, or one of a module that is no plain Linear, Embedding, LayerNorm or
            RMSNorm; tolerance is outside [0, 1).
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
    routes = Routes(len(exclusive), tolerance, next(model.parameters()).device)
    tied = _tied_names(model, exclusive)

    def look(_, inputs: tuple, named: dict) -> None:
        routes.batch = max(
            (len(t) for t in (*inputs, *named.values()) if isinstance(t, Tensor) and t.dim() > 1), default=1
        )

    with ExitStack() as stack:  # leaving a handle's context removes its hook
        stack.enter_context(model.register_forward_pre_hook(look, with_kwargs=True))
        for name, module in model.named_modules():
            parts = {
                parameter: _parts(exclusive, tied[f"{name}.{parameter}".removeprefix(".")], tensor)
                for parameter, tensor in module.named_parameters(recurse=False)
            }
            if any(parts.values()) and name.endswith("relative_attention_bias"):
                encoder = model.get_submodule(name.rpartition(".")[0])
                stack.enter_context(_position_bias(name, encoder, parts["weight"], routes))
            elif any(parts.values()):
                stack.enter_context(module.register_forward_hook(_hook(name, module, parts, routes)))
        yield routes


def _tied_names(model: nn.Module, exclusive: Mapping[str, Mapping[str, Part]]) -> dict[str, list[str]]:
    """Per name of a parameter all names that it has, itself first."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for expert, parts in exclusive.items():
        for name in parts:
            if name not in parameters:
                raise ValueError(f"exclusive part {name} of {expert} is no parameter of the {type(model).__name__}")
    names = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    return {name: sorted(names[id(p)], key=lambda other, name=name: other != name) for name, p in parameters.items()}


def _parts(exclusive: Mapping[str, Mapping[str, Part]], names: Sequence[str], like: Tensor) -> dict[int, Part]:
    """By position of the expert, its part of a parameter, on the parameter's device."""
    found = {}
    for position, expert in enumerate(exclusive.values()):
        name = next((name for name in names if name in expert), None)
        if name is not None:
            part = expert[name]
            low = isinstance(part, LowRank)
            found[position] = LowRank(*(t.to(like.device) for t in part)) if low else dense(part).to(like.device)
    return found


def _hook(name: str, module: nn.Module, parts: dict[str, dict[int, Part]], routes: Routes) -> Callable:
    forward = type(module).forward  # a subclass with a forward of its own may do more than its class says
    if forward in (nn.Linear.forward, nn.Embedding.forward):
        add = _matrix(parts["weight"], parts.get("bias", {}), module, routes)
    elif forward is nn.LayerNorm.forward or _is_rms_norm(module):
        add = _norm(parts["weight"], parts.get("bias", {}), module, routes)
    else:
        known = "plain Linear, Embedding, LayerNorm and RMSNorm"
        raise ValueError(f"routed inference knows {known}; {name} is a {type(module).__name__}")

    def hook(_, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if len(output) == 1 < routes.batch:  # position ids, given once for all
            x, output = (t.expand(routes.batch, *t.shape[1:]) for t in (x, output))
        _check_batch(name, len(output), routes)
        with torch.autocast(output.device.type, enabled=False):  # the shared layer has chosen the dtype already
            return add(x, output.contiguous())

    return hook


def _check_batch(name: str, batch: int, routes: Routes) -> None:
    if batch % len(routes.weights):
        raise ValueError(
            f"{name} sees a batch of {batch}, "
            f"which is no multiple of the {len(routes.weights)} samples in routes.weights"
        )


def _matrix(weight: dict[int, Part], bias: dict[int, Tensor], module: nn.Module, routes: Routes) -> Callable:
    """Add ``w_t (L_t (R_t x) + b_t)``, where x is a vector or, for an embedding, the one-hot code of an id."""
    linear = isinstance(module, nn.Linear)
    low = {t: part for t, part in weight.items() if isinstance(part, LowRank)}
    whole = {t: part for t, part in weight.items() if t not in low}
    tensors = [*_stacked(low, bias, module.weight, linear, routes.experts), *whole.values()]
    cast = cache(lambda dtype: [tensor.to(dtype) for tensor in tensors])  # autocast asks for another dtype

    def add(x: Tensor, output: Tensor) -> Tensor:
        inner, outer, *matrices = cast(output.dtype)
        here = routes.on(output.device)
        out = output.view(len(routes.weights), -1, output.shape[-1])  # samples, repeats, d_out
        x = x.to(output.dtype).reshape(*out.shape[:2], -1) if linear else x.reshape(out.shape[:2])
        for block in here.blocks if outer.shape[1] else ():
            found = _inner_linear(x, inner, block) if linear else _inner_embedding(x, inner, block)
            ranks = outer.shape[1]
            if bias:
                found[..., ranks - 1 :: ranks] = 1
            found *= block.weights.repeat_interleave(ranks, -1)[:, :, None]
            _add_outer(out, found, outer, block)
        for t, matrix in zip(whole, matrices, strict=True):
            if t in here.single:
                block = here.single[t]
                found = F.linear(x[block.samples], matrix) if linear else F.embedding(x[block.samples], matrix)
                _add(out, found * block.weights[0, :, :, None], block)
        return output

    return add


def _stacked(
    low: dict[int, LowRank], bias: dict[int, Tensor], like: Tensor, linear: bool, experts: int
) -> tuple[Tensor, Tensor]:
    """The low-rank parts of all experts: inner factors, which meet x, and outer ones, which give the output.

    A bias is one more rank: its outer factor is the bias, its product with x is 1. Smaller ranks are filled up with 0.

    Returns:
        Inner factors, (experts, ranks, d_in), or for an embedding (d_in, experts, ranks), so that an id gathers from
        contiguous memory; outer factors, (experts, ranks, d_out).
    """
    ranks = max((part.right.shape[0] for part in low.values()), default=0) + bool(bias)
    d_in, d_out = reversed(like.shape) if linear else like.shape
    inner = like.new_zeros((experts, ranks, d_in) if linear else (d_in, experts, ranks))
    outer = like.new_zeros(experts, ranks, d_out)
    for t, (left, right) in low.items():
        met, given = (right, left.T) if linear else (left, right)
        (inner[t, : len(right)] if linear else inner[:, t, : len(right)]).copy_(met)
        outer[t, : len(right)] = given
    for t, shift in bias.items():
        outer[t, -1] = shift
    return inner, outer


def _inner_linear(x: Tensor, inner: Tensor, block: Block) -> Tensor:
    """``R_t x``, (groups, samples, repeats, experts * ranks), of x (samples, repeats, d_in)."""
    groups, size, _ = block.weights.shape
    x = x[block.samples]
    matrices = inner[block.experts.start : block.experts.stop].view(groups, -1, inner.shape[-1])
    found = torch.bmm(matrices, x.reshape(groups, -1, x.shape[-1]).transpose(1, 2))  # faster so for a few odd ranks
    return found.transpose(1, 2).unflatten(1, (size, -1))


def _inner_embedding(ids: Tensor, inner: Tensor, block: Block) -> Tensor:
    """The same of the one-hot codes of ids (samples, repeats)."""
    groups, size, experts = block.weights.shape
    owners = torch.arange(block.experts.start, block.experts.stop, device=ids.device).view(groups, 1, 1, experts)
    return inner[ids[block.samples].view(groups, size, -1, 1), owners].flatten(3)


def _add_outer(out: Tensor, found: Tensor, outer: Tensor, block: Block) -> None:
    """Add ``sum_t L_t found_t`` to out (samples, repeats, d_out)."""
    groups, size, repeats, ranks = found.shape
    found = found.flatten(1, 2)
    matrices = outer[block.experts.start : block.experts.stop].view(groups, ranks, -1)
    if isinstance(block.samples, slice):
        out[block.samples].view(groups, size * repeats, -1).baddbmm_(found, matrices)
    else:
        _add(out, torch.bmm(found, matrices).view(groups * size, repeats, -1), block)


def _add(out: Tensor, values: Tensor, block: Block) -> None:
    if isinstance(block.samples, slice):
        out[block.samples] += values
    else:
        out.index_add_(0, block.samples, values)


def _norm(weight: dict[int, Part], bias: dict[int, Part], module: nn.Module, routes: Routes) -> Callable:
    """Add ``w_t (scale_t * normalized x + shift_t)`` of all experts, in float32: vectors are cheap."""
    scale, shift = (_tables(vectors, module.weight, routes) for vectors in (weight, bias))
    normalize = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps

    def add(x: Tensor, output: Tensor) -> Tensor:
        weights = routes.on(output.device).weights
        by_sample = (len(weights), -1, scale.shape[1])
        normal = normalize(x.float(), module.weight.shape, eps=eps).reshape(by_sample)
        total = output.float().view(by_sample).addcmul_(normal, (weights @ scale)[:, None])
        if bias:
            total += (weights @ shift)[:, None]
        return total.view(output.shape).to(output.dtype)

    return add


def _tables(parts: dict[int, Part], like: Tensor, routes: Routes) -> Tensor:
    """Parts of a small parameter as rows that the weights mix, (experts, elements), in float32."""
    zero = torch.zeros_like(like)
    return torch.stack([dense(parts.get(t, zero)).float() for t in range(routes.experts)]).flatten(1)


@contextmanager
def _position_bias(name: str, encoder: nn.Module, parts: dict[int, Part], routes: Routes) -> Iterator[None]:
    """Give every sample an attention bias of its own in MPNet, whose encoder makes one for all layers and samples.

    The encoder looks it up by pairs of positions, (queries, keys), which no sample owns: a hook on the embedding would
    have no place for the samples, the method that repeats the bias for each of them has.
    """
    if not hasattr(encoder, "compute_position_bias"):
        raise ValueError(f"routed inference cannot mix {name}: its ids are pairs of positions, not samples")
    embedding, shared = encoder.relative_attention_bias, encoder.compute_position_bias
    tables = _tables(parts, embedding.weight, routes)

    def mixed(x: Tensor, *inputs, **named) -> Tensor:
        _check_batch(name, len(x), routes)
        pairs = []
        with embedding.register_forward_pre_hook(lambda _, seen: pairs.append(seen[0])):
            bias = shared(x, *inputs, **named)  # samples * repeats, heads, queries, keys
        with torch.autocast(x.device.type, enabled=False):
            table = (routes.on(x.device).weights @ tables).view(-1, *embedding.weight.shape)
        own = table[:, pairs[0]].permute(0, 3, 1, 2).to(bias.dtype)
        return bias + own.repeat_interleave(len(x) // len(own), 0)

    encoder.compute_position_bias = mixed
    try:
        yield
    finally:
        del encoder.compute_position_bias  # the class's own shows again


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether the module is `weight * x / rms(x)`; a second argument would be a gate."""
    return (
        "RMSNorm" in type(module).__name__
        and [(name, p.dim()) for name, p in module.named_parameters()] == [("weight", 1)]
        and (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))
        and len(inspect.signature(module.forward).parameters) == 1
    )
