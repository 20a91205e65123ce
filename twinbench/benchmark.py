"""One configuration, measured: merge, route, score every task of a suite. Nothing here reads config or writes to disk.

The jobs of a sweep run in one process and share what is expensive through small caches: a merge, a router, a forward
pass over a test split. Each is keyed by all that it depends on, so a shared number is the number.
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from twinbench.merging.merged import Merged, exclusive_bytes, exclusive_kind, shared_bytes
from twinbench.merging.method import Method, merge
from twinbench.records.record import ROUTED_TO, ROUTER_ACCURACY
from twinbench.routing import learned
from twinbench.routing.learned import Setting
from twinbench.routing.router import Mlp, Oracle, Router
from twinbench.suite import Suite
from twinbench.system.device import name as device_name
from twinbench.system.memory import peak_memory
from twinbench.system.mistakes import Mistake, mistakes
from twinbench.workloads.classification import score as classification
from twinbench.workloads.generation import data as language

COLUMNS = ("task", "split", "row", "label", "prediction", "route")  # of predictions


def validate(tasks: list[str], method: Method, router: Mlp | Oracle, protocol: str) -> None:
    """Find what is wrong with hyperparameters before any weight is read, by merging models that have no tensors.

    Raises:
        ValueError: a hyperparameter is out of range, or the protocol and the router contradict each other.
    """
    if protocol == "blind" and isinstance(router, Oracle):
        raise Mistake("protocol=blind knows no task, which is what router=oracle goes by; choose router=mlp")
    nothing = {task: {} for task in tasks}
    with mistakes():
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
        merged, merge_seconds = merge(suite, method, setting.gold_biases)
        router_bytes, router_seconds = 0, 0.0
        if setting.router:
            router, router_seconds = learned.learned(suite, method.shared or method, setting)
            router_bytes = learned.router_bytes(suite, router, merged.shared, setting)
        rows, frames = [], []
        for task, part in ((task, part) for task, spec in suite.tasks.items() for part in spec.scored(split)):
            chosen, asked = None, 0.0
            if setting.router:
                weights, asked = learned.weights(suite, method.shared or method, setting, task, part)
                chosen = np.array(list(suite.experts))[weights.argmax(1).cpu()]
            measured, further = (suite, method, route, forward, task, part), {}
            if suite.causal:
                values, frame, seconds, further = language.measure(*measured)
            else:
                lost = chosen != task if protocol == "blind" else None
                values, frame, seconds = classification.measure(*measured, lost)
            primary = next(iter(values)) if part == split else None
            values |= {} if chosen is None else _choices(suite, task, chosen)
            frames.append(frame.assign(task=task, split=part, route=chosen))
            common = {"task": task, "split": part, "n": len(frame), "route_seconds": asked, "eval_seconds": seconds}
            common |= further
            rows += [common | {"metric": m, "primary": m == primary, "value": value} for m, value in values.items()]
    common = {
        "merge_seconds": merge_seconds,
        "router_seconds": router_seconds,
        **_storage(suite, method, merged),
        "router_bytes": router_bytes,
        "peak_memory_bytes": peak.bytes,
        "device": device_name(device),
    }
    beside = [name for name in frames[0] if name not in COLUMNS]
    return [row | common for row in rows], pd.concat(frames, ignore_index=True)[[*COLUMNS, *beside]]


def built(
    suite: Suite, method: Method, router: Mlp | Oracle, protocol: str, seed: int, device: str, batch_size: int
) -> tuple[Merged, Router | None]:
    """What `run` measures with the same arguments: the merged model, and the learned router if one is asked."""
    _, setting = _planned(method, router, protocol, seed, device, batch_size)
    merged, _ = merge(suite, method, setting.gold_biases)
    return merged, learned.learned(suite, method.shared or method, setting)[0] if setting.router else None


def _planned(
    method: Method, router: Mlp | Oracle, protocol: str, seed: int, device: str, batch_size: int
) -> tuple[str | None, Setting]:
    """How w(x) is found, after the protocol and the router had their say, and the setting of what asks the router."""
    route = "task" if method.route == "router" and isinstance(router, Oracle) else method.route
    if protocol == "blind" and route == "task":
        route = "top1"  # even a method for the known task has to ask the router which task that is
    asked = (router, seed) if route in ("router", "top1") or protocol == "blind" else (None, None)
    return route, Setting(protocol == "paper", *asked, device, batch_size)


def _choices(suite: Suite, task: str, chosen: np.ndarray) -> dict[str, float]:
    """The router's accuracy, where the task has an expert, and the share of rows that each expert got."""
    accuracy = {ROUTER_ACCURACY: float(np.mean(chosen == task))} if task in suite.experts else {}
    return accuracy | {f"{ROUTED_TO}{expert}": float(np.mean(chosen == expert)) for expert in suite.experts}


def _storage(suite: Suite, method: Method, merged: Merged) -> dict[str, int | str]:
    """Bytes of the shared and of the exclusive parts as they would be written, and how the latter would be."""
    if suite.factored:
        shares, own = ({t: p for t, p in merged.exclusive.items() if (t in suite.experts) == e} for e in (False, True))
        base = sum(file.stat().st_size for file in suite.base_folder.glob("*.safetensors"))  # too large to write to see
        common, exclusive = base + exclusive_bytes(Merged({}, shares)), Merged({}, own)
    else:
        common, exclusive = shared_bytes(merged), merged
    taken, kind = exclusive_bytes(exclusive), exclusive_kind(exclusive)
    if suite.adapter_bytes and not suite.factored and method.identity.startswith("individual "):
        taken, kind = suite.adapter_bytes, "LoRA adapters"  # that their differences are dense here is our own doing
    return {"shared_bytes": common, "exclusive_bytes": taken, "exclusive_kind": kind}
