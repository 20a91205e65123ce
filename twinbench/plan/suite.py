"""What a suite's configuration says: which tasks are scored, whose experts are merged, how experts are fine-tuned."""

import importlib
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

from twinbench.system.mistakes import Mistake, one_of


def workload(suite: Mapping) -> ModuleType:
    """What a plan knows of the suite's kind of model: the module ``twinbench.workloads.NAME.settings``.

    Raises:
        ValueError: there is no such kind.
    """
    one_of("suite.workload", suite["workload"], workloads())
    return importlib.import_module(f"twinbench.workloads.{suite['workload']}.settings")


@cache
def workloads() -> tuple[str, ...]:
    """The kinds of models that there are: the folders of ``twinbench.workloads``."""
    return tuple(sorted(path.parent.name for path in (Path(__file__).parents[1] / "workloads").glob("*/settings.py")))


def narrowed(suite: Mapping) -> dict:
    """The suite with the tasks that its ``only`` lists (and their order); null keeps all.

    Raises:
        ValueError: an unknown task, or none.
    """
    only = suite["only"]
    if only is None:
        return dict(suite)
    if not only:
        raise Mistake("suite.only must list at least one task, or be null")
    for task in only:
        one_of("task in suite.only", task, suite["tasks"])
    kept = {key: suite[key] and {t: suite[key][t] for t in only if t in suite[key]} for key in ("tasks", "checkpoints")}
    return dict(suite) | kept


def merged(suite: Mapping) -> list[str]:
    """The tasks whose experts are merged: those that its ``merged`` lists, or all that have an expert of their own.

    Raises:
        ValueError: a task in it that the suite has no expert for, or none.
    """
    own = own_experts(suite)
    if suite["merged"] is None:
        return own
    if not suite["merged"]:
        raise Mistake("suite.merged must list at least one task, or be null")
    for task in suite["merged"]:
        one_of("task in suite.merged", task, own)
    return [task for task in own if task in suite["merged"]]


def scored(suite: Mapping) -> list[str]:
    """The tasks that are scored: those that its ``scored`` lists, or all. The experts of others may be merged.

    Raises:
        ValueError: an unknown task, or none.
    """
    if suite["scored"] is None:
        return list(suite["tasks"])
    if not suite["scored"]:
        raise Mistake("suite.scored must list at least one task, or be null")
    for task in suite["scored"]:
        one_of("task in suite.scored", task, suite["tasks"])
    return [task for task in suite["tasks"] if task in suite["scored"]]


def scaled(suite: Mapping) -> dict[str, float]:
    """Per expert that ``scaled`` names what its task vector is multiplied by: a stress test.

    Raises:
        ValueError: a task in it whose expert is not merged, a factor that is no number, or experts that stay factors.
    """
    given = suite["scaled"] or {}
    for task, factor in given.items():
        one_of("task in suite.scaled", task, merged(suite))
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
            raise Mistake(f"suite.scaled.{task} must be a finite number, got {factor!r}")
    if given and suite.get("factored"):
        raise Mistake("suite.scaled multiplies whole task vectors: use suite.factored=false")
    return dict(given)


def own_experts(suite: Mapping) -> list[str]:
    """The tasks with an expert of their own; the others name the task whose head scores them, or have a linear probe.

    Raises:
        ValueError: a task names one that has no expert either, or has a probe, too.
    """
    own = [name for name, task in suite["tasks"].items() if task.get("head") is None and not task.get("probe")]
    for name, task in suite["tasks"].items():
        if task.get("head") is not None:
            one_of(f"head of task {name}", task["head"], own)
            if task.get("probe"):
                raise Mistake(f"task {name}: set one of head and probe, and leave out the other")
    return own


def recipe(suite: Mapping, task: Mapping) -> dict:
    """How the expert of a task is fine-tuned: as the suite says, but for what the task's own ``finetune`` changes."""
    return suite["finetune"] | (task.get("finetune") or {})
