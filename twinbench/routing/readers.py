"""Which modules must run once per route, and whether routed inference then equals the dense merge.

The first batch of a model tells. Two of its samples run alone under merged weights, and together under shared ones. So
each use of a parameter is seen; and an axis that is twice as long with both samples is the one that they lie along.
A known operation on samples takes the parts of all routes at once. Where a parameter is used otherwise (relative
positions, another axis first, a mixture's experts), the innermost module around it that sees samples runs per route.
"""

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves_with_path, tree_map

from twinbench.routing.batch import Routes
from twinbench.routing.varying import MERGED, ROUTED, SHARED, Read, Source, Use, unsupported
from twinbench.system.mistakes import Mistake

ROUNDING = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest output; 5e-5 in float32
SHARE = 1e-3  # of the largest effect of the parts

Shapes = dict[str, tuple[int, ...]]  # of the tensors in nested arguments or results, by their path
Axes = dict[str, int | None]  # the samples' axis of such tensors; None: they belong to no sample
Calls = dict[str, list[tuple[Shapes, Shapes]]]  # per module, of what it was given and gave


class Batch:
    """The arguments of a model's forward, from which samples can be taken."""

    def __init__(self, args: tuple, kwargs: dict):
        self.args, self.kwargs = args, kwargs
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1]
        self.rows = max((len(tensor) for tensor in tensors), default=1)
        self.lengths = {1, *(tensor.shape[1] for tensor in tensors)}

    def only(self, rows: list[int]) -> "Batch":
        """Some rows, with a copy of their cache."""

        def chosen(value):
            if isinstance(value, Tensor):
                return value[rows] if value.dim() > 1 and len(value) == self.rows else value
            if not is_cache(value):
                return value
            copied = deepcopy(value)
            if copied.get_seq_length():
                copied.batch_select_indices(torch.tensor(rows))
            return copied

        picked = tree_map(chosen, (self.args, self.kwargs), is_leaf=is_cache)
        return Batch(*picked)


def is_cache(value) -> bool:
    return hasattr(value, "get_seq_length")


def learn(model: nn.Module, run: Callable, batch: Batch, use: Use) -> dict[str, tuple[Axes, Axes]]:
    """The modules that must run once per route, with the samples' axes in what they are given and give.

    Args:
        run: the model's forward.

    Raises:
        ValueError: no module around a use of a parameter sees samples.
    """
    pair = firsts(batch, use.routes)
    (_, calls, reads), (_, both_calls, both_reads) = (
        watched(model, run, batch.only(rows), use, SHARED) for rows in (pair[:1], pair)
    )
    found = {}
    for name, alone in reads.items():
        both = both_reads.get(name, [])
        uses = zip(alone, both, strict=True) if len(alone) == len(both) else ()
        slow = [read for read, again in uses if not _on_samples(read, again, batch.lengths)] if uses else alone
        for read in slow:
            axes = {around: _axes(calls[around], both_calls.get(around, []), batch.lengths) for around in read.modules}
            inner = next((around for around in reversed(read.modules) if axes[around]), None)
            if inner is None:
                raise unsupported(use.model, [name])
            found[inner] = axes[inner]
    return found


def firsts(batch: Batch, routes: Routes) -> list[int]:
    """Rows of the batch: the first of each of the first two distinct routes."""
    return [int(samples[0]) * (batch.rows // len(routes.weights)) for samples, _ in routes.groups()[:2]]


def watched(
    model: nn.Module, run: Callable, batch: Batch, use: Use, mode: str
) -> tuple[object, Calls, dict[str, list[Read]]]:
    """Run a batch: what the model gives, what its modules were given and gave, and how each parameter was used."""
    calls, given = {}, []

    def enter(name: str) -> Callable:
        def hook(_, args: tuple, kwargs: dict) -> None:
            use.running.append(name)
            given.append(_shapes((args, kwargs)))

        return hook

    def leave(name: str) -> Callable:
        def hook(_, args: tuple, kwargs: dict, output) -> None:
            use.running.pop()
            calls.setdefault(name, []).append((given.pop(), _shapes(output)))

        return hook

    use.running, use.reads = [""], {}
    with ExitStack() as stack:
        stack.callback(use.running.clear)
        stack.enter_context(use.giving(mode))
        for name, module in model.named_modules():
            if module is not model:
                stack.enter_context(module.register_forward_pre_hook(enter(name), with_kwargs=True))
                stack.enter_context(module.register_forward_hook(leave(name), with_kwargs=True))
        output = run(*batch.args, **batch.kwargs)
        calls[""] = [(_shapes((batch.args, batch.kwargs)), _shapes(output))]
        return output, calls, use.reads


def check(model: nn.Module, run: Callable, batch: Batch, use: Use, sources: list[Source]) -> None:
    """Compare one sample, or two of different routes, with the dense merge, which is made one tensor at a time.

    Raises:
        ValueError: they differ, or a parameter is read in a way that nobody sees.
    """
    rows, groups = firsts(batch, use.routes), use.routes.groups()
    expected, seen = [], set()
    for row, (_, one) in zip(rows, groups, strict=False):
        with use.routes.narrowed(one):
            output, _, reads = watched(model, run, batch.only([row]), use, MERGED)
        expected.append(_tensors(output))
        seen |= reads.keys()
    together = use.routes.of(torch.cat([one.weights for _, one in groups[: len(rows)]]), len(rows), tolerance=0.0)
    results = {}
    for mode in (SHARED, ROUTED):
        with use.routes.narrowed(together), use.giving(mode):
            results[mode] = _tensors(run(*batch.only(rows).args, **batch.only(rows).kwargs))
    effect, error, largest = 0.0, 0.0, 0.0
    for at, alone in enumerate(expected):
        for path, tensor in alone.items():
            mine, plain = (_sample(results[mode][path], at, tensor) for mode in (ROUTED, SHARED))
            error = max(error, _difference(mine, tensor))
            effect = max(effect, _largest(plain - tensor))
            largest = max(largest, _largest(tensor))
    device, dtype = sources[0].shared.device.type, sources[0].shared.dtype
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    bound = ROUNDING.get(dtype, 5e-5) * largest + SHARE * effect
    if not error <= bound:
        raise Mistake(
            f"routed inference does not support {use.model}: its first samples differ from the dense merge by "
            f"{error:.1e} (the exclusive parts change its output by {effect:.1e}, allowed is {bound:.1e}); what works: "
            "experts that differ in fewer kinds of layers, such as LoRA experts, or router.groups=1"
        )
    _check_unseen(run, batch.only(rows[:1]), use, [s for s in sources if s.name not in seen and not s.handled])


def _check_unseen(run: Callable, batch: Batch, use: Use, sources: list[Source]) -> None:
    """Parameters that no operation asked for must not matter: NaN in their place does not show."""
    if not sources:
        return
    kept = [source.shared.detach().clone() for source in sources]
    try:
        for source in sources:
            source.shared.detach().fill_(float("nan"))
        with use.giving(SHARED):
            outputs = _tensors(run(*batch.args, **batch.kwargs))
    finally:
        for source, tensor in zip(sources, kept, strict=True):
            source.shared.detach().copy_(tensor)
    if any(tensor.isnan().any() for tensor in outputs.values()):
        raise unsupported(use.model, [source.name for source in sources])


def _shapes(values) -> Shapes:
    return {path: tuple(tensor.shape) for path, tensor in leaves(values) if isinstance(tensor, Tensor)}


def _tensors(values) -> dict[str, Tensor]:
    return {path: t.detach() for path, t in leaves(values) if isinstance(t, Tensor) and t.is_floating_point()}


def leaves(values) -> list[tuple[str, object]]:
    """What nested arguments or results hold, by path; a cache is one thing."""
    return [(keystr(path), leaf) for path, leaf in tree_leaves_with_path(values, is_leaf=is_cache)]


def _on_samples(alone: Read, both: Read, lengths: set[int]) -> bool:
    """Whether a known operation used a parameter on an input of samples first, or of position ids for all of them.

    A sample is one row of the input or one for each of its tokens. Another number are tokens that the model picks.
    """
    given_once = alone.operation == "embedding" and alone.shape == both.shape and alone.shape[0] == 1
    known = alone.operation is not None and alone.operation == both.operation
    return known and (given_once or (_axis(alone.shape, both.shape) == 0 and alone.shape[0] in lengths))


def _axes(
    alone: list[tuple[Shapes, Shapes]], both: list[tuple[Shapes, Shapes]], lengths: set[int]
) -> tuple[Axes, Axes] | None:
    """The samples' axes in what a module is given and gives, the same in all its calls; None where it sees none.

    As in `_on_samples`, a sample has one place on its axis or one for each of its tokens.
    """
    found: tuple[Axes, Axes] = {}, {}
    if len(alone) != len(both):
        return None
    for call, again in zip(alone, both, strict=True):
        for axes, shapes, others in zip(found, call, again, strict=True):
            if shapes.keys() != others.keys():
                return None
            for path, shape in shapes.items():
                axis = _axis(shape, others[path])
                if axis == -1 or axes.setdefault(path, axis) != axis:
                    return None
                if axis is not None and shape[axis] not in lengths:
                    return None
    return found if any(axis is not None for axis in found[0].values()) else None


def _axis(shape: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    """Which axis is twice as long in the other shape, which is otherwise equal; None: none, -1: that is not all."""
    differing = [at for at, (n, m) in enumerate(zip(shape, other, strict=False)) if n != m]
    if len(shape) == len(other) and not differing:
        return None
    twice = len(shape) == len(other) and len(differing) == 1 and other[differing[0]] == 2 * shape[differing[0]]
    return differing[0] if twice else -1


def _sample(both: Tensor, at: int, like: Tensor) -> Tensor:
    """One sample's share of a result, along the axis that differs from its own result alone."""
    axis = _axis(tuple(like.shape), tuple(both.shape))
    return both if axis is None or axis == -1 else both.narrow(axis, at * like.shape[axis], like.shape[axis])


def _largest(tensor: Tensor) -> float:
    """The largest finite magnitude."""
    return tensor.float().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if tensor.numel() else 0.0


def _difference(tensor: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors; infinite where only one of them is, or is not a number."""
    same = (tensor == other) | (tensor.isnan() & other.isnan())
    apart = (tensor.float() - other.float())[~same].abs().nan_to_num(nan=torch.inf)
    return apart.max().item() if apart.numel() else 0.0
