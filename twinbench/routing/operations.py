"""Operations that take the parts of a parameter beside the shared weights, exactly and for all samples at once.

Twin-Merging's Eq. 3 moves from the weights to the activations. A matrix product is
``y = W_s x + b_s + sum_t w_t (L_t (R_t x) + b_t)``; an embedding gathers rows of L_t instead; a vector that scales or
shifts, as those of norm layers do, is mixed for each sample.

The factors of a layer lie one expert after the other, so that any range of experts is a slice. A batch is covered by
*blocks*, and a block costs two matrix products: one block covers everything where most weights count; a near-one-hot
batch has groups of as many samples for each expert, and takes about one expert's products per sample.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twinbench.routing.batch import Block, Routes
from twinbench.system.mistakes import Mistake
from twinbench.weights.parts import LowRank, Part

Plain = Callable[[], Tensor]


class Known(NamedTuple):
    """An operation that can be routed: its name, the input whose first dimension is samples, and how it runs."""

    name: str
    x: Tensor
    run: Callable[[Plain, Routes], Tensor]  # the first gives the shared weights' result


def known(func: Callable, args: tuple, kwargs: dict) -> Known | None:
    """What an operation on `routing.varying.Varying` parameters is, if their parts can be added to its result.

    Args:
        func, args, kwargs: as ``__torch_function__`` gets them.
    """
    if func is F.embedding:
        return _product("embedding", *_given(args, kwargs, "input", "weight"), None, False)
    if func is F.linear:
        return _product("linear", *_given(args, kwargs, "input", "weight", "bias"), False)
    if func is torch.addmm and len(args) == 3 and not kwargs:
        return _product("linear", *(args[at] for at in (1, 2, 0)), True)
    if func in (Tensor.matmul, torch.matmul) and len(args) == 2:
        return _product("linear", *args, None, True)
    if func in (F.layer_norm, F.rms_norm) and not varies(args[0]):
        return Known(func.__name__, args[0], lambda _, routes: _norm(func, args, kwargs, routes))
    if func in (Tensor.mul, torch.mul, Tensor.add, torch.add) and len(args) == 2 and not kwargs:
        x, vector = args if varies(args[1]) else args[::-1]
        if not varies(x) and vector.dim() == 1 and x.dim() > 1 and x.shape[-1] == len(vector):
            return Known(func.__name__, x, lambda _, routes: _mixed(func, x, vector, routes))
    return None


def varies(value) -> bool:
    return hasattr(value, "source")


def _given(args: tuple, kwargs: dict, *names: str) -> list:
    """A function's first arguments, by position or by name; None where there is none."""
    found = dict(zip(names, args, strict=False)) | kwargs
    return [found.get(name) for name in names]


def _product(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Known | None:
    """A matrix product ``x W^T + b``, or ``x W + b`` where W is ``transposed``; or the one-hot codes of ids times W."""
    if varies(x) or x.dim() < (1 if name == "embedding" else 2) or weight.dim() != 2 or (varies(bias) and bias.chain):
        return None

    def run(plain: Plain, routes: Routes) -> Tensor:
        output, ids = plain(), x
        owner = (weight if varies(weight) else bias).source
        if name == "embedding" and len(output) == 1 < routes.batch:  # position ids, given once for all
            ids, output = (t.expand(routes.batch, *t.shape[1:]) for t in (ids, output))
        check_batch(owner.name, len(output), routes)
        flipped = transposed != (varies(weight) and weight.flipped)
        key = name, flipped, bias.source.name if varies(bias) else None
        if key not in owner.adders:
            parts = weight.source.parts(flipped) if varies(weight) else {}
            shifts = bias.source.parts(False) if varies(bias) else {}
            shape = tuple(weight.T.shape if transposed else weight.shape)
            owner.adders[key] = _matrix(parts, shifts, owner.shared, shape, name == "linear", routes.experts)
        with torch.autocast(output.device.type, enabled=False):  # the shared layer has chosen the dtype already
            return owner.adders[key](ids, output.contiguous(), routes)

    return Known(name, x, run)


def check_batch(name: str, batch: int, routes: Routes) -> None:
    """Refuse an input whose rows are not the samples: each once, or each of its tokens.

    Tokens that a model picks from several samples would take the routes of others.
    """
    samples = len(routes.weights)
    if batch % samples:
        raise Mistake(
            f"{name} sees a batch of {batch}, which is no multiple of the {samples} samples in routes.weights"
        )
    if samples > 1 and batch not in {routes.batch * length for length in routes.lengths}:
        raise Mistake(
            f"{name} sees {batch} rows of a batch of {routes.batch}, which are no samples and not all of their tokens; "
            "what works: experts that are equal in it, or batch_size=1"
        )


def _matrix(
    weight: dict[int, Part], bias: dict[int, Tensor], like: Tensor, shape: tuple[int, ...], linear: bool, experts: int
) -> Callable[[Tensor, Tensor, Routes], Tensor]:
    """Add ``w_t (L_t (R_t x) + b_t)``, where x is a vector or, for an embedding, the one-hot code of an id."""
    low = {t: part for t, part in weight.items() if isinstance(part, LowRank)}
    whole = {t: part for t, part in weight.items() if t not in low}
    tensors = [*_stacked(low, bias, like, shape, linear, experts), *whole.values()]
    cast = cache(lambda dtype: [tensor.to(dtype) for tensor in tensors])  # autocast asks for another dtype

    def add(x: Tensor, output: Tensor, routes: Routes) -> Tensor:
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
    low: dict[int, LowRank],
    bias: dict[int, Tensor],
    like: Tensor,
    shape: tuple[int, ...],
    linear: bool,
    experts: int,
) -> tuple[Tensor, Tensor]:
    """The low-rank parts of all experts: inner factors, which meet x, and outer ones, which give the output.

    A bias is one more rank: its outer factor is the bias, its product with x is 1. Smaller ranks are filled up with 0.

    Args:
        like: a tensor of the parameter's dtype and device.
        shape: of the weight, (d_out, d_in), or of an embedding (d_in, d_out).

    Returns:
        Inner factors, (experts, ranks, d_in), or for an embedding (d_in, experts, ranks), so that an id gathers from
        contiguous memory; outer factors, (experts, ranks, d_out).
    """
    ranks = max((part.right.shape[0] for part in low.values()), default=0) + bool(bias)
    d_in, d_out = reversed(shape) if linear else shape
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
    # Ranks last, so that they lie as the weights do, and as the product with the outer factors takes them.
    found = torch.bmm(x.reshape(groups, -1, x.shape[-1]), matrices.transpose(1, 2))
    return found.unflatten(1, (size, -1))


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


def _norm(func: Callable, args: tuple, kwargs: dict, routes: Routes) -> Tensor:
    """A norm with every sample's own scale and shift, in float32: vectors are cheap."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    names = names if func is F.layer_norm else tuple(name for name in names if name != "bias")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, shape, weight, bias = (given.get(name) for name in (*names[:3], "bias"))
    dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        eps = {"eps": given["eps"]} if given.get("eps") is not None else {}
        normal = func(x.float(), shape, **eps)
        for vector, by in ((weight, Tensor.mul), (bias, Tensor.add)):
            if vector is not None:
                normal = _mixed(by, normal, vector, routes) if varies(vector) else by(normal, vector.float())
    return normal.to(dtype)


def _mixed(func: Callable, x: Tensor, vector: Tensor, routes: Routes) -> Tensor:
    """Scale or shift x (samples * repeats, ..., n) by every sample's own vector (n)."""
    rows = vector.source.rows(routes.on(x.device))
    for step in vector.chain:
        rows = step(rows)
    check_batch(vector.source.name, len(x), routes)
    found = func(x.reshape(len(rows), -1, x.shape[-1]), rows.float()[:, None])
    return found.view(x.shape).to(torch.promote_types(x.dtype, vector.dtype))
