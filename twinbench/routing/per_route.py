"""A module that runs once per distinct route of a batch, on the samples that take it: exact, whatever it computes."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from twinbench.routing.readers import Axes, is_cache, leaves
from twinbench.routing.varying import ROUTED, Use, unsupported
from twinbench.system.mistakes import Mistake


def by_route(name: str, forward: Callable, given: Axes, gives: Axes, use: Use) -> Callable:
    """A module's forward, run once per route where several are in the model.

    Args:
        given, gives: the samples' axes in its arguments and its results.

    Raises:
        ValueError: when it runs: a cache, which has all samples in it, or a result that no sample owns and that
            differs between routes.
    """

    @wraps(forward)
    def routed(*args, **kwargs):
        groups = use.routes.groups() if use.mode == ROUTED else ()
        if len(groups) < 2:
            with use.keeping():
                return forward(*args, **kwargs)
        found, samples = leaves((args, kwargs)), len(use.routes.weights)
        if any(is_cache(leaf) for _, leaf in found):
            raise unsupported(use.model, [name])
        shape = tree_flatten((args, kwargs), is_leaf=is_cache)[1]
        axes = [_axis(leaf, given.get(path, -1), use.routes.batch) for path, leaf in found]
        outputs = []
        for rows, one in groups:
            pieces = [_rows(leaf, axis, samples, rows) for (_, leaf), axis in zip(found, axes, strict=True)]
            its_args, its_kwargs = tree_unflatten(pieces, shape)
            with use.routes.narrowed(one), use.keeping():
                outputs.append(forward(*its_args, **its_kwargs))
        order = torch.cat([rows for rows, _ in groups]).argsort()
        sizes = [len(rows) for rows, _ in groups]
        joined = [
            _joined(f"{name}: {each[0][0]}", [leaf for _, leaf in each], gives.get(each[0][0]), sizes, order)
            for each in zip(*map(leaves, outputs), strict=True)
        ]
        return tree_unflatten(joined, tree_flatten(outputs[0], is_leaf=is_cache)[1])

    return routed


def _axis(leaf, learned: int | None, batch: int) -> int | None:
    """The samples' axis of an argument: as it was learned, or the first where it is new and as long as the batch."""
    if learned != -1 or not isinstance(leaf, Tensor):
        return learned
    return 0 if leaf.dim() > 1 and len(leaf) == batch else None


def _rows(leaf, axis: int | None, samples: int, rows: Tensor):
    """What is the given samples' of an argument."""
    if axis is None or not isinstance(leaf, Tensor) or leaf.shape[axis] == 1 < samples:
        return leaf
    split = leaf.unflatten(axis, (samples, -1))
    return split.index_select(axis, rows.to(leaf.device)).flatten(axis, axis + 1)


def _joined(name: str, pieces: list, axis: int | None, sizes: list[int], order: Tensor):
    """One result of all samples, in their order, from those of the routes."""
    first = pieces[0]
    if not isinstance(first, Tensor):
        return first
    if axis is None and all(torch.equal(first, other) for other in pieces[1:]):
        return first
    if axis is None:
        if len(first) != 1:
            raise Mistake(f"routed inference cannot join {name}, which differs between routes and has no samples")
        axis, pieces = 0, [piece.expand(size, *piece.shape[1:]) for piece, size in zip(pieces, sizes, strict=True)]
    apart = [piece.unflatten(axis, (size, -1)) for piece, size in zip(pieces, sizes, strict=True)]
    return torch.cat(apart, axis).index_select(axis, order.to(first.device)).flatten(axis, axis + 1)
