"""A merging method with its hyperparameters, and what it makes of a suite."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from twinbench.merging import factored
from twinbench.merging.merged import Merged, materialize
from twinbench.suite import Suite
from twinbench.system.mistakes import Mistake
from twinbench.weights.state_dict import StateDict

FACTORED = ("individual", "twin_merging")  # of the methods with exclusive parts, those with a form for LoRA factors


@dataclass(frozen=True)
class Method:
    """A merging method with its hyperparameters.

    Attributes:
        identity: equal for methods that give the same weights from the same experts; all that is compared and hashed.
        merge: called with the base and the experts, and with ``shared`` if there is a shared method.
        route: how w(x) is found: None (no exclusive parts), "task" (the known task), "router" or "layer" (gates).
        shared: the static method that makes the shared expert, if the method asks for one.
    """

    identity: str
    merge: Callable[..., Merged] = field(compare=False)
    route: str | None = field(compare=False)
    shared: "Method | None" = field(compare=False)


@lru_cache(maxsize=3)
def merge(suite: Suite, method: Method, gold_biases: bool) -> tuple[Merged, float]:
    """The merge in memory and its seconds, those of its shared expert included."""
    names = [name for name in suite.base if not (gold_biases and "bias" in name)]
    base, *experts = (StateDict(names, state.__getitem__) for state in (suite.base, *suite.experts.values()))
    experts = dict(zip(suite.experts, experts, strict=True))
    label = method.identity.partition("{")[0]
    if suite.factored:
        start = time.perf_counter()
        return _factored(suite, method), time.perf_counter() - start
    if method.shared:
        shared, before = merge(suite, method.shared, gold_biases)
        start = time.perf_counter()
        merged = method.merge(base, experts, shared=shared.shared)
    else:
        before, start = 0.0, time.perf_counter()
        merged = method.merge(base, experts)
    return materialize(merged, progress=f"merging {label}"), before + time.perf_counter() - start


def _factored(suite: Suite, method: Method) -> Merged:
    """The merge of LoRA experts as factors beside the base, which stays as it is.

    Raises:
        ValueError: the method, or its compression, has no factored form.
    """
    settings, name = _bound(method.merge), method.identity.partition(" ")[0]
    if method.route and name not in FACTORED:
        raise Mistake(f"{name} has no factored form ({', '.join(FACTORED)} have): use suite.factored=false")
    if settings.get("compression", "svd") != "svd":
        raise Mistake(f"suite.factored=true keeps factors: compression must be svd, got {settings['compression']!r}")
    if method.route == "task":
        return factored.merge(suite.base, suite.experts, None, 1.0)
    static = (method.shared or method).merge
    return factored.merge(suite.base, suite.experts, static, settings["rank_ratio"] if method.shared else None)


def _bound(function: Callable) -> dict:
    """The keywords of a partial function and of those inside it, which are not one where Hydra made them."""
    inner = getattr(function, "func", None)
    return (_bound(inner) if inner else {}) | getattr(function, "keywords", {})
