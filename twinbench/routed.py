"""One forward for a batch whose samples have different routes, without building any merged weights.

Twin-Merging's Eq. 3 moves from the weights to the activations: for a linear layer and the factors of each exclusive
part ``y = W_s x + b_s + sum_t w_t (L_t (R_t x) + b_t)``; an embedding gathers rows of L_t instead; the vectors of norm
layers are mixed per sample. `attach` adds this to a model by forward hooks, so its modules, names and state dict stay
those of the shared expert.

The factors of a layer lie one expert after the other, so that any range of experts is a slice. A batch is covered by
*blocks*, a range of samples times a range of experts each, and a block costs two matrix products: one block covers
everything where most weights count, and a near-one-hot batch takes about one expert's products per sample.
"""

import inspect
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinbench.compress import LowRank, Part, dense

DENSE = 0.5  # share of weights that count above which one block of all experts is faster than many small ones


class Routes:
    """The routes of the batch that is in the model now."""

    def __init__(self, experts: int, tolerance: float, device: torch.device):
        self.experts, self.tolerance, self.device = experts, tolerance, device
        self.batch = 1  # of the model's inputs

    @property
    def weights(self) -> Tensor:
        """Router weights, (samples, experts); they hold until others are set, through all steps of a generation.

        A module may see each sample several times in a row (beams, tokens flattened into the batch).
        """
        return self._weights

    @weights.setter
    def weights(self, weights: Tensor) -> None:
        if weights.dim() != 2 or weights.shape[1] != self.experts:
            raise ValueError(f"weights must be (samples, {self.experts} experts), got {tuple(weights.shape)}")
        self.blocks = _blocks(weights.tolist(), self.tolerance)  # on the host, once a batch: layers never wait for it
        self._weights = weights.to(self.device, torch.float32)


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
    routes, handles = Routes(len(exclusive), tolerance, next(model.parameters()).device), []
    tied = _tied_names(model, exclusive)

    def look(_, inputs: tuple, named: dict) -> None:
        routes.batch = max(
            (len(t) for t in (*inputs, *named.values()) if isinstance(t, Tensor) and t.dim() > 1), default=1
        )

    handles.append(model.register_forward_pre_hook(look, with_kwargs=True))
    try:
        for name, module in model.named_modules():
            parts = {
                parameter: _parts(exclusive, tied[f"{name}.{parameter}".removeprefix(".")], tensor)
                for parameter, tensor in module.named_parameters(recurse=False)
            }
            if any(parts.values()):
                handles.append(module.register_forward_hook(_hook(name, module, parts, routes)))
        yield routes
    finally:
        for handle in handles:
            handle.remove()


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
    if "relative_attention_bias" in name:
        raise ValueError(f"routed inference cannot mix {name}: its ids are pairs of positions, not samples")
    forward = type(module).forward  # a subclass with a forward of its own may do more than its class says
    if forward in (nn.Linear.forward, nn.Embedding.forward):
        add = _matrix(parts["weight"], parts.get("bias", {}), module, routes)
    elif forward is nn.LayerNorm.forward or _is_rms_norm(module):
        add = _norm(parts["weight"], parts.get("bias", {}), module, routes)
    else:
        known = "plain Linear, Embedding, LayerNorm and RMSNorm"
        raise ValueError(f"routed inference knows {known}; {name} is a {type(module).__name__}")

    def hook(_, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, samples = inputs[0], len(routes.weights)
        if len(output) == 1 < routes.batch:  # position ids, given once for all
            x, output = (t.expand(routes.batch, *t.shape[1:]) for t in (x, output))
        if len(output) % samples:
            raise ValueError(
                f"{name} sees a batch of {len(output)}, which is no multiple of the {samples} samples in routes.weights"
            )
        with torch.autocast(output.device.type, enabled=False):  # the shared layer has chosen the dtype already
            return add(x, output.contiguous())

    return hook


def _matrix(weight: dict[int, Part], bias: dict[int, Tensor], module: nn.Module, routes: Routes) -> Callable:
    """Add ``w_t (L_t (R_t x) + b_t)``, where x is a vector or, for an embedding, the one-hot code of an id."""
    linear, like = isinstance(module, nn.Linear), module.weight
    low = {t: part for t, part in weight.items() if isinstance(part, LowRank)}
    whole = {t: part for t, part in weight.items() if t not in low}
    factors, owner = _stacked(low, bias, like, linear, routes.experts)
    starts = [bisect_left(owner, t) for t in range(routes.experts + 1)]
    owner = torch.tensor(owner, dtype=torch.long, device=like.device)
    tensors = [tensor.to(like.dtype) for tensor in (*factors, *whole.values())]
    cast = cache(lambda dtype: [tensor.to(dtype) for tensor in tensors])  # autocast asks for another dtype

    def product(x: Tensor, matrix: Tensor, constant: Tensor | None = None) -> Tensor:
        return F.linear(x, matrix, constant) if linear else F.embedding(x, matrix.T)

    def add(x: Tensor, output: Tensor) -> Tensor:
        inner, outer, constant, *matrices = cast(output.dtype)
        x = x.to(output.dtype).reshape(-1, x.shape[-1]) if linear else x.reshape(-1)
        out = output.view(-1, output.shape[-1])
        repeats = len(out) // len(routes.weights)
        for samples, experts in routes.blocks:
            rows = slice(samples.start * repeats, samples.stop * repeats)
            ranks = slice(starts[experts.start], starts[experts.stop])
            if ranks.start < ranks.stop:
                found = product(x[rows], inner[ranks], constant[ranks] if bias else None)
                out[rows].addmm_(_weighted(found, routes.weights[samples][:, owner[ranks]]), outer[ranks])
            for t, matrix in zip(whole, matrices, strict=True):
                if experts.start <= t < experts.stop:
                    found = product(x[rows], matrix if linear else matrix.T)
                    out[rows] += _weighted(found, routes.weights[samples, t : t + 1])
        return output

    return add


def _stacked(
    low: dict[int, LowRank], bias: dict[int, Tensor], like: Tensor, linear: bool, experts: int
) -> tuple[tuple[Tensor, Tensor, Tensor], list[int]]:
    """The low-rank parts of all experts as rows: inner factors, which meet x, outer ones, which give the output.

    A bias is one more rank: its outer row is the bias, its product with x the constant 1.

    Returns:
        Inner factors (ranks, d_in), outer ones (ranks, d_out) and constants (ranks,); the expert of every rank.
    """
    inner, outer, constant, owner = [], [], [], []
    for t in range(experts):
        right, left = (low[t].right, low[t].left.T) if t in low else (like.new_empty(0, d) for d in like.shape[::-1])
        shift = bias[t][None] if t in bias else like.new_empty(0, len(like))
        inner += [right, right.new_zeros(len(shift), right.shape[1])] if linear else [left]
        outer += [left, shift] if linear else [right]
        constant += [0.0] * len(right) + [1.0] * len(shift)
        owner += [t] * (len(right) + len(shift))
    rows = torch.cat(inner) if linear else torch.cat([f.T for f in inner], 1).T  # an id gathers from contiguous memory
    return (rows, torch.cat(outer), torch.tensor(constant, device=like.device)), owner


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Multiply (samples * repeats, k) in place by (samples, k), each row of which serves ``repeats`` in a row."""
    values.view(len(weights), -1, values.shape[-1]).mul_(weights.to(values.dtype)[:, None])
    return values


def _norm(weight: dict[int, Part], bias: dict[int, Part], module: nn.Module, routes: Routes) -> Callable:
    """Add ``w_t (scale_t * normalized x + shift_t)`` of all experts, in float32: vectors are cheap."""
    shape = module.weight.shape
    scale, shift = (
        torch.stack([vectors.get(t, module.weight.new_zeros(shape)).float() for t in range(routes.experts)]).flatten(1)
        for vectors in (weight, bias)
    )
    normalize = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps

    def add(x: Tensor, output: Tensor) -> Tensor:
        by_sample = (len(routes.weights), -1, scale.shape[1])
        normal = normalize(x.float(), shape, eps=eps).reshape(by_sample)
        total = torch.addcmul(output.float().view(by_sample), normal, (routes.weights @ scale)[:, None])
        if bias:
            total += (routes.weights @ shift)[:, None]
        return total.view(output.shape).to(output.dtype)

    return add


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether the module is `weight * x / rms(x)`; a second argument would be a gate."""
    return (
        "RMSNorm" in type(module).__name__
        and [(name, p.dim()) for name, p in module.named_parameters()] == [("weight", 1)]
        and (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))
        and len(inspect.signature(module.forward).parameters) == 1
    )


def _blocks(weights: list[list[float]], tolerance: float) -> list[tuple[slice, slice]]:
    """Ranges of samples and of experts that together cover every weight above the tolerance."""
    counts = [[not abs(weight) <= tolerance for weight in column] for column in zip(*weights, strict=True)]
    samples, experts = len(weights), len(counts)
    if sum(map(sum, counts)) > DENSE * samples * experts:
        return [(slice(0, samples), slice(0, experts))]
    blocks = []
    for ranges, alike in groupby(range(experts), key=lambda t: _runs(counts[t])):
        first, *rest = alike
        blocks += [(slice(*run), slice(first, first + len(rest) + 1)) for run in ranges]
    return blocks


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """Start and stop of every run of true values."""
    bounds = [0, *(i for i in range(1, len(flags)) if flags[i] != flags[i - 1]), len(flags)]
    return [(start, stop) for start, stop in pairwise(bounds) if flags[start]]
