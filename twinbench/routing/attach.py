"""One forward for a batch whose samples have different routes, without building any merged weights.

`attach` puts a `routing.varying.Varying` in the place of every parameter that has parts, so a model's modules, names
and tensors stay those of the shared expert, and no operation misses a part. Linear layers, embeddings and norms add the
parts of all routes at once (`routing.operations`). A module that uses a parameter otherwise runs once per route
(`routing.per_route`). The first batch tells which do, and is compared with the dense merge (`routing.readers`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from twinbench.merging.merged import Merged
from twinbench.routing.batch import Routes
from twinbench.routing.operations import check_batch
from twinbench.routing.per_route import by_route
from twinbench.routing.readers import Axes, Batch, check, learn
from twinbench.routing.varying import MERGED, ROUTED, SHARED, Source, Use, Varying, varying
from twinbench.system.mistakes import Mistake

_learned: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()  # a model is compared once, not for every merge


@contextmanager
def attach(model: nn.Module, merged: Merged, tolerance: float = 0.0) -> Iterator[Routes]:
    """Let ``model``, which holds the shared weights, add a merge's other parts while the context lasts.

    The first batch of a model, and the first with several routes, is compared with the dense merge: one sample or two,
    with one merged tensor in memory at a time.

    Args:
        merged: its ``exclusive`` and ``always`` parts are added, by parameter name of ``model``; a part of a tied
            parameter acts wherever it is tied. The order of the experts in ``exclusive`` is that of the weights, and
            what is in ``always`` has the weight 1 for every sample. Its shared part is not read.
        tolerance: in linear layers and embeddings, an expert whose weight for a sample is at most this may be skipped.
            At most ``len(merged.exclusive) * tolerance`` of a sample's weight is skipped. 0 is exact.

    Yields:
        Routes: set its ``weights`` before a forward or a generation. The batch in the model must be theirs, or a
            multiple that repeats each sample in a row.

    Raises:
        ValueError: a part has no parameter, or tolerance is outside [0, 1). When the model runs: the weights are not
            set, a parameter is used in a way that several routes in a batch do not allow, or the first batch differs
            from the dense merge.
    """
    if not 0 <= tolerance < 1:
        raise Mistake(f"tolerance must be in [0, 1), got {tolerance}")
    always, device = len(merged.always), next(model.parameters()).device
    use = Use(type(model).__name__, Routes(always + len(merged.exclusive), tolerance, device, always))
    sources = _sources(model, merged, use)
    with ExitStack() as stack:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if id(parameter) in sources:
                    stack.callback(module._parameters.__setitem__, name, parameter)
                    module._parameters[name] = sources[id(parameter)][1]
        found = [source for source, _ in sources.values()]
        for source in found:
            encoder, _, name = source.name.rpartition("relative_attention_bias.")
            if name and hasattr(model.get_submodule(encoder.rstrip(".")), "compute_position_bias"):
                stack.enter_context(_position_bias(model.get_submodule(encoder.rstrip(".")), source, use))
        stack.enter_context(instead(model, "forward", _routed(model, found, use, stack)))
        yield use.routes


def _sources(model: nn.Module, merged: Merged, use: Use) -> dict[int, tuple[Source, Varying]]:
    """By identity of the parameter what stands for it: a tied one has the parts of all its names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    owned = [*(("all experts", parts) for parts in merged.always), *merged.exclusive.items()]
    for position, (owner, parts) in enumerate(owned):
        for name, part in parts.items():
            if name not in parameters:
                raise Mistake(f"part {name} of {owner} is no parameter of the {use.model}")
            found.setdefault(id(parameters[name]), (name, parameters[name], {}))[2].setdefault(position, part)
    return {key: (source := Source(*given, use), varying(source)) for key, given in found.items()}


def _routed(model: nn.Module, sources: list[Source], use: Use, stack: ExitStack) -> Callable:
    """The model's forward with the parts; it learns from the first batch what must run once per route."""
    run = model.forward
    names, known = frozenset(source.name for source in sources), _learned.setdefault(model, {})

    def split(modules: dict[str, tuple[Axes, Axes]]) -> None:
        nonlocal run
        for name, axes in modules.items():
            if name:
                module = model.get_submodule(name)
                stack.enter_context(instead(module, "forward", by_route(name, module.forward, *axes, use)))
            else:
                run = by_route(use.model, run, *axes, use)

    split(known.get((names, True), {}))

    @wraps(run)
    def routed(*args, **kwargs):
        batch, routes = Batch(args, kwargs), use.routes
        if routes.weights is None:
            raise Mistake("routes.weights are not set")
        routes.batch, routes.lengths = batch.rows, batch.lengths
        check_batch(use.model, batch.rows, routes)
        groups = routes.groups()
        one = routes.narrowed(groups[0][1]) if len(groups) == 1 else nullcontext()
        key = names, len(groups) > 1
        with one, use.giving(ROUTED):
            if sources and key not in known:
                with torch.no_grad(), torch.random.fork_rng(devices=_gpus(model)):
                    found = learn(model, run, batch, use) if len(groups) > 1 else {}
                    split(found)
                    check(model, run, batch, use, sources)
                known[key] = found
            return run(*args, **kwargs)

    return routed


def _gpus(model: nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}


@contextmanager
def instead(owner: nn.Module, name: str, function: Callable) -> Iterator[None]:
    """Let a module have another method while the context lasts."""
    before = owner.__dict__.get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)  # the class's own shows again
        else:
            setattr(owner, name, before)


@contextmanager
def _position_bias(encoder: nn.Module, source: Source, use: Use) -> Iterator[None]:
    """Give every sample an attention bias of its own in MPNet, whose encoder makes one for all layers and samples.

    The encoder looks it up by pairs of positions, (queries, keys), which no sample owns. It could run once per route;
    to repeat the bias for each sample is faster.
    """
    embedding, shared = encoder.relative_attention_bias, encoder.compute_position_bias
    source.handled = True

    def mixed(x: Tensor, *inputs, **named) -> Tensor:
        pairs = []
        with embedding.register_forward_pre_hook(lambda _, seen: pairs.append(seen[0])):
            bias = shared(x, *inputs, **named)  # samples * repeats, heads, queries, keys
        if use.mode in (SHARED, MERGED):
            return bias
        check_batch(source.name, len(x), use.routes)
        with torch.autocast(x.device.type, enabled=False):
            table = source.rows(use.routes.on(x.device)) - source.shared
        own = table[:, pairs[0]].permute(0, 3, 1, 2).to(bias.dtype)
        return bias + own.repeat_interleave(len(x) // len(own), 0)

    with instead(encoder, "compute_position_bias", mixed):
        yield
