"""One configuration, measured: merge, route, score the tasks of a suite. It reads no config and writes nothing."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from twinbench.merging.merged import Merged, exclusive_bytes, exclusive_kind, gate_bytes, shared_bytes
from twinbench.merging.method import Method
from twinbench.protocol import Protocol
from twinbench.records.record import ROUTED_TO, ROUTER_ACCURACY
from twinbench.routing import learned
from twinbench.routing.learned import Setting
from twinbench.routing.router import Router
from twinbench.system.device import name as device_name
from twinbench.system.load import others
from twinbench.system.memory import peak_memory
from twinbench.system.mistakes import mistakes
from twinbench.workbench import Workbench, merged

COLUMNS = ("task", "split", "row", "label", "prediction", "route")  # of predictions


def validate(tasks: list[str], method: Method) -> None:
    """Find what is wrong with hyperparameters before any weight is read, by merging models that have no tensors.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    nothing = {task: {} for task in tasks}
    with mistakes():
        given = {"shared": method.shared.merge({}, nothing).shared} if method.shared else {}
        method.merge({}, nothing, **given)


def run(bench: Workbench, setting: Setting, protocol: Protocol, split: str = "test") -> tuple[list[dict], pd.DataFrame]:
    """Measure one configuration on a split of each scored task, and with the test on what is scored beside it.

    Args:
        split: "test", or "validation" to choose hyperparameters by.

    Returns:
        Rows to be completed into records (task, split, metric, value, n, seconds, bytes), and the predictions of every
        row: task, split, row, label, prediction, route (the expert with the router's largest weight, or None).
    """
    suite, frames = bench.suite, []
    with peak_memory(bench.device) as peak, others() as elsewhere:
        made, merge_seconds = merged(bench, setting.method, setting.gold_biases)
        router_bytes, router_seconds = gate_bytes(made) if setting.route == "layer" else 0, 0.0
        if setting.router:
            router, router_seconds = learned.learned(bench, setting)
            router_bytes += learned.router_bytes(bench, setting, router, made.shared)
        rows = []
        tasks = {name: suite.tasks[name] for name in suite.scored or suite.tasks}
        for task, part in ((task, part) for task, spec in tasks.items() for part in spec.scored(split)):
            found, frame = _scored(bench, setting, protocol, task, part)
            rows += [row | {"primary": row["primary"] and part == split} for row in found]
            frames.append(frame)
    common = {
        "merge_seconds": merge_seconds,
        "router_seconds": None if math.isnan(router_seconds) else router_seconds,
        **_storage(bench, setting.method, made),
        "router_bytes": router_bytes,
        "peak_memory_bytes": peak.bytes,
        "others_share": elsewhere.share,
        "device": device_name(bench.device),
    }
    beside = [name for name in frames[0] if name not in COLUMNS]
    return [row | common for row in rows], pd.concat(frames, ignore_index=True)[[*COLUMNS, *beside]]


def built(bench: Workbench, setting: Setting) -> tuple[Merged, Router | None]:
    """What `run` measures with the same arguments: the merged model, and the learned router if one is asked."""
    made, _ = merged(bench, setting.method, setting.gold_biases)
    return made, learned.learned(bench, setting)[0] if setting.router else None


def _scored(
    bench: Workbench, setting: Setting, protocol: Protocol, task: str, split: str
) -> tuple[list[dict], pd.DataFrame]:
    """Rows of one split of a task, a row per metric, and its predictions."""
    chosen, asked = None, 0.0
    if setting.router:
        weights, asked = learned.weights(bench, setting, task, split)
        chosen = np.array(list(bench.suite.experts))[weights.argmax(1).cpu()]
    # A route that does not depend on the router shares its forward pass with other routers' runs.
    forward = setting if setting.route in ("router", "top1") else replace(setting, router=None, seed=None)
    heads = None if protocol.knows_task else chosen
    values, frame, seconds, further = bench.suite.workload.score(bench, forward, task, split, heads)
    primary = next(iter(values))
    values |= {} if chosen is None else _choices(bench, task, chosen)
    common = {"task": task, "split": split, "n": len(frame), "route_seconds": asked, "eval_seconds": seconds} | further
    rows = [common | {"metric": metric, "primary": metric == primary, "value": v} for metric, v in values.items()]
    return rows, frame.assign(task=task, split=split, route=chosen)


def _choices(bench: Workbench, task: str, chosen: np.ndarray) -> dict[str, float]:
    """The router's accuracy, where the task has an expert, and the share of rows that each expert got."""
    accuracy = {ROUTER_ACCURACY: float(np.mean(chosen == task))} if task in bench.suite.experts else {}
    return accuracy | {f"{ROUTED_TO}{expert}": float(np.mean(chosen == expert)) for expert in bench.suite.experts}


def _storage(bench: Workbench, method: Method, made: Merged) -> dict[str, int | str]:
    """Bytes of the shared and of the exclusive parts as they would be written, and how the latter would be."""
    suite, written = bench.suite, None
    if suite.factored:  # too large to write to see
        written = sum(file.stat().st_size for file in suite.base_folder.glob("*.safetensors"))
    taken, kind = exclusive_bytes(made), exclusive_kind(made)
    if suite.adapter_bytes and not suite.factored and method.role == "upper bound":
        taken, kind = suite.adapter_bytes, "LoRA adapters"  # that their differences are dense here is our own doing
    return {"shared_bytes": shared_bytes(made, written), "exclusive_bytes": taken, "exclusive_kind": kind}
