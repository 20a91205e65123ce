"""One configuration, measured: merge, route, score every task of a suite. Nothing here reads config or writes to disk.

The jobs of a sweep run in one process and share what is expensive through small caches: a merge, a router, a forward
pass over a test split. Each is keyed by all that it depends on, so a shared number is the number.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from twinbench import inference, provenance
from twinbench.memory import peak_memory
from twinbench.merged import Merged, exclusive_bytes, materialize, shared_bytes, stored_bytes, with_route
from twinbench.metrics import score
from twinbench.routed import attach
from twinbench.router import Mlp, Oracle, Router, fit, grouped
from twinbench.state_dict import StateDict
from twinbench.suite import Suite, backbone, classifier

SHARED = 24  # rows on average that share a route from which on merging it costs less than running its parts beside
ROUTER_TRAIN = 0.8  # of each task's validation rows train a router of no others; the rest chooses its epoch


@dataclass(frozen=True)
class Method:
    """A merging method with its hyperparameters.

    Attributes:
        identity: equal for methods that give the same weights from the same experts; all that is compared and hashed.
        merge: called with the base and the experts, and with ``shared`` if there is a shared method.
        route: how w(x) is found: None (no exclusive parts), "task" (the known task) or "router".
        shared: the static method that makes the shared expert, if the method asks for one.
    """

    identity: str
    merge: Callable[..., Merged] = field(compare=False)
    route: str | None = field(compare=False)
    shared: "Method | None" = field(compare=False)


@dataclass(frozen=True)
class Setting:
    """What a forward pass depends on beside the suite and the method.

    Attributes:
        gold_biases: biases are the known task's own and not merged (protocol ``paper``).
        router, seed: of the learned router; None where none is asked.
        device, batch_size: where models run, and in what portions.
    """

    gold_biases: bool
    router: Mlp | None
    seed: int | None
    device: str
    batch_size: int


@dataclass(frozen=True)
class Pass:
    """Logits of a task's rows in a split, (n, outputs), and the seconds that they took."""

    logits: Tensor
    seconds: float


def validate(tasks: list[str], method: Method, router: Mlp | Oracle, protocol: str) -> None:
    """Find what is wrong with hyperparameters before any weight is read, by merging models that have no tensors.

    Raises:
        ValueError: a hyperparameter is out of range, or the protocol and the router contradict each other.
    """
    if protocol == "blind" and isinstance(router, Oracle):
        raise ValueError("protocol=blind knows no task, which is what router=oracle goes by; choose router=mlp")
    nothing = {task: {} for task in tasks}
    if method.shared:
        method.merge({}, nothing, shared=method.shared.merge({}, nothing).shared)
    else:
        method.merge({}, nothing)


def run(
    suite: Suite,
    method: Method,
    router: Mlp | Oracle,
    protocol: str,
    seed: int,
    device: str,
    batch_size: int,
    split: str = "test",
) -> tuple[list[dict], pd.DataFrame]:
    """Measure one configuration on a split of every task, and with the test on what is scored beside it.

    Args:
        split: "test", or "validation" to choose hyperparameters by.

    Returns:
        Rows to be completed into records (task, split, metric, value, n, seconds, bytes), and the predictions of every
        row: task, split, row, label, prediction, route (the expert with the router's largest weight, or None).
    """
    route, setting = _planned(method, router, protocol, seed, device, batch_size)
    forward = setting if route in ("router", "top1") else replace(setting, router=None, seed=None)
    with peak_memory(device) as peak:
        merged, merge_seconds = _merged(suite, method, setting.gold_biases)
        router_bytes = _router(suite, method.shared or method, setting)[1] if setting.router else 0
        rows, frames = [], []
        for task, part in ((task, part) for task, spec in suite.tasks.items() for part in spec.scored(split)):
            scored = _forward(suite, method, route, forward, task, part)
            chosen, routing = None, 0.0
            if setting.router:
                weights, routing = _routed(suite, method.shared or method, setting, task, part)
                chosen = weights.argmax(1).cpu().numpy()
            frame = _predictions(suite, task, part, scored.logits.numpy(), chosen, blind=protocol == "blind")
            frames.append(frame)
            seconds = {"route_seconds": routing, "eval_seconds": scored.seconds}
            found = _scores(suite, task, frame)
            rows += [row | seconds | {"split": part, "primary": row["primary"] and part == split} for row in found]
    common = {
        "merge_seconds": merge_seconds,
        "shared_bytes": shared_bytes(merged),
        "exclusive_bytes": exclusive_bytes(merged),
        "router_bytes": router_bytes,
        "peak_memory_bytes": peak.bytes,
        "device": _device_name(device),
    }
    return [row | common for row in rows], pd.concat(frames, ignore_index=True)


def built(
    suite: Suite, method: Method, router: Mlp | Oracle, protocol: str, seed: int, device: str, batch_size: int
) -> tuple[Merged, Router | None]:
    """What `run` measures with the same arguments: the merged model, and the learned router if one is asked."""
    _, setting = _planned(method, router, protocol, seed, device, batch_size)
    merged, _ = _merged(suite, method, setting.gold_biases)
    return merged, _router(suite, method.shared or method, setting)[0] if setting.router else None


def _planned(
    method: Method, router: Mlp | Oracle, protocol: str, seed: int, device: str, batch_size: int
) -> tuple[str | None, Setting]:
    """How w(x) is found, after the protocol and the router had their say, and the setting of what asks the router."""
    route = "task" if method.route == "router" and isinstance(router, Oracle) else method.route
    if protocol == "blind" and route == "task":
        route = "top1"  # even a method for the known task has to ask the router which task that is
    asked = (router, seed) if route in ("router", "top1") or protocol == "blind" else (None, None)
    return route, Setting(protocol == "paper", *asked, device, batch_size)


@lru_cache(maxsize=3)
def _merged(suite: Suite, method: Method, gold_biases: bool) -> tuple[Merged, float]:
    """The merge in memory and its seconds, those of its shared expert included."""
    names = [name for name in suite.base if not (gold_biases and "bias" in name)]
    base, *experts = (StateDict(names, state.__getitem__) for state in (suite.base, *suite.experts.values()))
    experts = dict(zip(suite.experts, experts, strict=True))
    label = method.identity.partition("{")[0]
    if method.shared:
        shared, before = _merged(suite, method.shared, gold_biases)
        start = time.perf_counter()
        merged = method.merge(base, experts, shared=shared.shared)
    else:
        before, start = 0.0, time.perf_counter()
        merged = method.merge(base, experts)
    return materialize(merged, progress=f"merging {label}"), before + time.perf_counter() - start


def _router(suite: Suite, shared: Method, setting: Setting) -> tuple[Router, int]:
    """The router and its stored bytes; how its weights are used later does not change it."""
    source, setting = _read(shared, setting)
    return _trained(suite, source, replace(setting, router=replace(setting.router, groups=None, tolerance=0.0)))


def _read(shared: Method, setting: Setting) -> tuple[Method | None, Setting]:
    """What the router's features depend on: the shared expert and whose biases it has, or neither."""
    return (shared, setting) if setting.router.source == "shared" else (None, replace(setting, gold_biases=False))


@lru_cache(maxsize=8)
def _trained(suite: Suite, source: Method | None, setting: Setting) -> tuple[Router, int]:
    device = backbone(suite, setting.device).device
    train, held_out = ([], []), ([], [])
    for position, task in enumerate(suite.experts):
        for (features, experts), rows in zip((train, held_out), _examples(suite, source, setting, task), strict=True):
            features.append(rows.to(device))
            experts.append(torch.full((len(rows),), position, device=device))
    router = fit(setting.router, *((torch.cat(f), torch.cat(e)) for f, e in (train, held_out)), setting.seed)
    return router, stored_bytes(router.state_dict())


def _examples(suite: Suite, source: Method | None, setting: Setting, task: str) -> tuple[Tensor, Tensor]:
    """Features of a task's rows that train the router, and of those that choose its epoch: at least one of each."""
    held_out = _features(suite, source, setting, task, "validation")[0]
    if setting.router.rows is not None:
        return _features(suite, source, setting, task, "train", setting.router.rows)[0], held_out
    count = min(max(1, int(ROUTER_TRAIN * len(held_out))), len(held_out) - 1)
    return held_out[:count], held_out[count:]


def _routed(suite: Suite, shared: Method, setting: Setting, task: str, split: str) -> tuple[Tensor, float]:
    """The router's weights (n, experts) for a task's rows in a split, and the seconds that they took."""
    return _weighed(suite, *_read(shared, setting), task, split)


@lru_cache(maxsize=128)
def _weighed(suite: Suite, source: Method | None, setting: Setting, task: str, split: str) -> tuple[Tensor, float]:
    router, _ = _router(suite, source, setting)
    rows, before = _features(suite, source, setting, task, split)
    start = time.perf_counter()
    rows = rows.to(backbone(suite, setting.device).device)
    weights = router(rows).cpu()
    if setting.router.groups is not None:
        weights = grouped(weights, router.logits(rows).cpu(), setting.router.groups, setting.seed)
    return weights, before + time.perf_counter() - start


def _features(
    suite: Suite, source: Method | None, setting: Setting, task: str, split: str, rows: int | None = None
) -> tuple[Tensor, float]:
    """What the router reads of the first rows of a split, and the seconds that it took.

    Args:
        source: of the model whose hidden states it reads; None is the base.
    """
    recipe, parts, seconds = setting.router, [], 0.0
    if recipe.source:
        where = (setting.gold_biases, setting.device, setting.batch_size)
        hidden, seconds = _extracted(suite, source, *where, recipe.layer, recipe.pool, task, split, rows)
        parts.append(hidden)
    if recipe.characters:
        start = time.perf_counter()
        parts.append(inference.characters(suite, task, split, recipe.characters, rows))
        seconds += time.perf_counter() - start
    return torch.cat(parts, 1), seconds


@lru_cache(maxsize=256)
def _extracted(
    suite: Suite,
    source: Method | None,
    gold_biases: bool,
    device: str,
    batch_size: int,
    layer: int | None,
    pool: str,
    task: str,
    split: str,
    rows: int | None,
) -> tuple[Tensor, float]:
    """Features under the model that ``source`` makes, or the base.

    Before routing the task is not known, so where biases are the known task's own these are the base's.
    """
    module = backbone(suite, device)
    merged = _merged(suite, source, gold_biases)[0].shared if source else {}
    module.load_state_dict(dict(suite.base.items()) | merged)
    inference.encoded(suite, task, split)
    start = time.perf_counter()
    found = inference.features(module, suite, task, split, layer=layer, pool=pool, rows=rows, batch_size=batch_size)
    return found, time.perf_counter() - start


@lru_cache(maxsize=128)
def _forward(suite: Suite, method: Method, route: str | None, setting: Setting, task: str, split: str) -> Pass:
    """Run a task's rows in a split through the merged model."""
    merged, _ = _merged(suite, method, setting.gold_biases)
    own = {name: suite.experts[task][name] for name in suite.base if name not in merged.shared}
    weights = _weights(suite, method, route, setting, task, split)
    inference.encoded(suite, task, split)
    module = backbone(suite, setting.device)
    model = classifier(suite, task, module)
    run = partial(inference.forward, model, suite, task, split, batch_size=setting.batch_size)
    start = time.perf_counter()
    if weights is None:
        module.load_state_dict(merged.shared | own)
        logits = run()
    else:
        distinct, group = weights.unique(dim=0, return_inverse=True)
        if len(distinct) > max(len(suite.experts), len(weights) // SHARED):
            module.load_state_dict(merged.shared | own)
            with attach(module, merged.exclusive, setting.router.tolerance) as routes:
                logits = run(routes=routes, weights=weights)
        else:  # a handful of routes, or groups of rows: merge each once and run its rows through a static model
            logits = None
            for number, route_weights in enumerate(distinct):
                rows = (group == number).nonzero().flatten()
                module.load_state_dict(with_route(merged, route_weights.tolist()) | own)
                found = run(rows=rows.tolist())
                if logits is None:
                    logits = found.new_empty(len(weights), found.shape[1])
                logits[rows] = found
    return Pass(logits, time.perf_counter() - start)


def _weights(suite: Suite, method: Method, route: str | None, setting: Setting, task: str, split: str) -> Tensor | None:
    """The weights w(x) of a task's rows in a split, (n, experts), or None for a static method.

    Args:
        route: as `Method.route`, after the protocol had its say; "top1" is one-hot at the router's choice.
    """
    if route is None:
        return None
    if route == "task":
        hot = torch.zeros(len(suite.tasks[task].splits[split]), len(suite.experts))
        hot[:, list(suite.experts).index(task)] = 1.0
        return hot
    weights, _ = _routed(suite, method.shared or method, setting, task, split)
    if route == "top1":
        return torch.zeros_like(weights).scatter_(1, weights.argmax(1, keepdim=True), 1.0)
    return weights


def _predictions(
    suite: Suite, task: str, split: str, logits: np.ndarray, chosen: np.ndarray | None, *, blind: bool
) -> pd.DataFrame:
    """Predictions as a frame.

    Under ``blind`` a row that the router sent to another task's head is wrong: its class is -1, its regression value
    the mean of the training labels, which is all that is known of a text nobody scored.
    """
    spec = suite.tasks[task]
    prediction = logits.argmax(1).astype(float) if spec.classes else logits[:, 0].astype(float)
    experts = list(suite.experts)
    if blind:
        lost = -1.0 if spec.classes else float(spec.labels("train").mean())
        prediction = np.where(chosen == experts.index(task), prediction, lost)
    return pd.DataFrame(
        {
            "task": task,
            "split": split,
            "row": range(len(prediction)),
            "label": spec.labels(split).astype(float),
            "prediction": prediction,
            "route": None if chosen is None else [experts[position] for position in chosen],
        }
    )


def _scores(suite: Suite, task: str, frame: pd.DataFrame) -> list[dict]:
    """The task's metrics, the primary one first; where a router was asked, also its choices and their accuracy."""
    labels, predictions = frame["label"].to_numpy(), frame["prediction"].to_numpy()
    values = {metric: score(metric, labels, predictions) for metric in suite.tasks[task].metrics}
    primary = next(iter(values))
    if frame["route"].notna().all():
        if task in suite.experts:
            values["router_accuracy"] = float((frame["route"] == task).mean())
        values |= {f"routed_to/{expert}": float((frame["route"] == expert).mean()) for expert in suite.experts}
    common = {"task": task, "n": len(frame)}
    return [common | {"metric": m, "primary": m == primary, "value": value} for m, value in values.items()]


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else provenance.machine()
