"""A parameter that differs between the samples of a batch: it stands for ``shared + sum_t w_t part_t``.

While it is in a model, every operation that reads it comes here. A known operation adds the parts' share to its result
(`routing.operations`). Any other gets merged weights if one route is in the model, and is an error if several are. So
no part is left out in silence, whatever module reads the parameter.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from twinbench.routing.batch import Routes
from twinbench.routing.operations import known
from twinbench.system.mistakes import Mistake
from twinbench.weights.parts import LowRank, Part, dense, kind

SHARED, MERGED, ROUTED = "shared", "merged", "routed"  # what operations get: no parts, merged weights, parts beside
CASTS = {"float", "half", "bfloat16", "double", "to", "add", "sub", "rsub", "mul"}  # of a vector, with numbers


class Read(NamedTuple):
    """One use of a parameter: in which modules, innermost last, and by which known operation on what shape."""

    modules: tuple[str, ...]
    operation: str | None
    shape: tuple[int, ...]


class Use:
    """What the parameters of one model share while parts are attached to it.

    Attributes:
        model: the class's name, for messages.
        routes: of the batch that is in the model.
        mode: SHARED, MERGED or ROUTED; None while the model does not run.
        running: names of the modules that run now, innermost last, and
        reads: per parameter its uses: both are kept while the model is watched.
        kept: merged parameters of the module that runs once per route, so that each is merged once.
    """

    def __init__(self, model: str, routes: Routes):
        self.model, self.routes = model, routes
        self.mode: str | None = None
        self.running: list[str] = []
        self.reads: dict[str, list[Read]] = {}
        self.kept: dict[str, Tensor] | None = None

    @contextmanager
    def giving(self, mode: str) -> Iterator[None]:
        """Run in a mode while the context lasts."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Merge each parameter at most once while the context lasts."""
        before, self.kept = self.kept, {}
        try:
            yield
        finally:
            self.kept = before


class Source:
    """A parameter's shared tensor and its parts, by position of the expert.

    Attributes:
        handled: another place adds the parts (`routing.attach`), so operations get the shared tensor.
        adders: what `routing.operations` made of the parts.
    """

    def __init__(self, name: str, shared: Tensor, parts: Mapping[int, Part], use: Use):
        self.name, self.shared, self.use = name, shared, use
        self.handled, self.adders = False, {}
        self._parts = {t: dense(part) if kind(part) == "dense" else part for t, part in parts.items()}
        self._table = None

    def parts(self, transposed: bool) -> dict[int, Part]:
        """On the parameter's device, dense or of low rank."""
        return {t: self._part(t, transposed) for t in self._parts}

    def _part(self, t: int, transposed: bool = False) -> Part:
        part = self._parts[t]
        if isinstance(part, LowRank):
            left, right = (factor.to(self.shared.device) for factor in part)
            return LowRank(right.mT, left.mT) if transposed else LowRank(left, right)
        whole = dense(part).to(self.shared.device)
        return whole.mT if transposed else whole

    def rows(self, routes: Routes) -> Tensor:
        """A small parameter under every sample's route, (samples, ...), in float32."""
        if self._table is None:
            parts, zero = self.parts(False), torch.zeros_like(self.shared)
            self._table = torch.stack([dense(parts.get(t, zero)).float() for t in range(routes.experts)])
        return torch.tensordot(routes.weights, self._table, 1).add_(self.shared)

    def merged(self) -> Tensor:
        """The parameter under the one route that is in the model, summed in float32."""
        kept = self.use.kept
        if kept is not None and self.name in kept:
            return kept[self.name]
        (route,) = self.use.routes.weights.tolist()
        total = self.shared.float()
        for t in self._parts:
            if route[t]:
                total = total + route[t] * dense(self._part(t))
        total = total.to(self.shared.dtype)
        if kept is not None:
            kept[self.name] = total
        return total


class Varying(Tensor):
    """A parameter of a model while parts are attached; made by `varying`.

    Attributes:
        chain: casts, added constants or a transposition that are done when the parameter is used.
        flipped: the chain transposes it.
    """

    source: Source
    chain: tuple[Callable[[Tensor], Tensor], ...]
    flipped: bool

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})


def varying(source: Source, chain: tuple = (), flipped: bool = False) -> Varying:
    made = _after(chain, source.shared.detach()).as_subclass(Varying)
    made.source, made.chain, made.flipped = source, chain, flipped
    return made


def unsupported(model: str, names: list[str]) -> Mistake:
    return Mistake(
        f"routed inference does not support how {model} uses {', '.join(dict.fromkeys(names))} for samples of "
        "different routes in one batch; what works: experts that are equal in it, or batch_size=1"
    )


def _call(func: Callable, args: tuple, kwargs: dict):
    """An operation with parameters that vary among its arguments."""
    flat = [*args, *kwargs.values()]
    flat += [item for items in flat if isinstance(items, list | tuple) for item in items]
    found = [item.source for item in flat if isinstance(item, Varying)]
    use = found[0].use

    def run(value: Callable[[Source], Tensor]):
        return func(*_replaced(args, value), **_replaced(kwargs, value))

    def shared():
        return run(lambda source: source.shared)

    if use.mode is None and use.routes.weights is None:
        return shared()
    if sum(isinstance(item, Tensor) for item in flat) == 1:
        result = shared()
        if not any(isinstance(leaf, Tensor | float) for leaf in tree_leaves(result)):
            return result  # a shape, a dtype, a device: no number of the parameter
        later = _later(func, args, kwargs)
        if later is not None:
            return later
    operation = known(func, args, kwargs)
    for source in (source for source in found if use.running and not source.handled):
        read = Read(tuple(use.running), *((operation.name, tuple(operation.x.shape)) if operation else (None, ())))
        use.reads.setdefault(source.name, []).append(read)
    if use.mode is None and len(use.routes.weights) > 1:
        raise Mistake(f"samples of different routes must run through the whole {use.model}, not a module of it")
    if use.mode == SHARED or (use.mode != MERGED and all(source.handled for source in found)):
        return shared()
    if use.mode != MERGED and operation is not None:
        return operation.run(shared, use.routes) if operation.x.numel() else shared()  # an expert may get no token
    if len(use.routes.weights) > 1:
        raise unsupported(use.model, [source.name for source in found])
    return run(Source.merged)


def _later(func: Callable, args: tuple, kwargs: dict) -> Varying | None:
    """The parameter after a cast, an added number or a transposition, which is then done when it is used."""
    one, *others = args
    if not isinstance(one, Varying):
        return None
    if one.dim() == 1 and getattr(func, "__name__", "") in CASTS:
        return varying(one.source, (*one.chain, lambda plain: func(plain, *others, **kwargs)))
    if one.dim() == 2 and (func == Tensor.t or func in (Tensor.T.__get__, Tensor.mT.__get__)):
        return varying(one.source, (*one.chain, torch.t), not one.flipped)
    return None


def _replaced(values, by: Callable[[Source], Tensor]):
    if isinstance(values, Varying):
        return _after(values.chain, by(values.source))
    if type(values) in (list, tuple):
        return type(values)(_replaced(item, by) for item in values)
    return {key: _replaced(item, by) for key, item in values.items()} if type(values) is dict else values


def _after(chain: tuple, tensor: Tensor) -> Tensor:
    for step in chain:
        tensor = step(tensor)
    return tensor
