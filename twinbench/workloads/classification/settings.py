"""What a plan knows of classifiers: their keys in a configuration, and which of these change a number. No torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from twinbench.system import source
from twinbench.system.mistakes import Mistake, one_of

if TYPE_CHECKING:  # it imports torch
    from twinbench.suite import Task

SPEC = "twinbench.workloads.classification.data.Spec"  # keys of a task
RECIPE = "twinbench.workloads.classification.finetune.Recipe"  # keys of ``finetune``
PROBE = "twinbench.workloads.classification.probe"  # its code fits a model, so it changes a number
KEYS = ("head", "corrupted")  # of a suite, beside those that every suite has
LOADED = True  # a task has ``data``, a function that reads its rows
HEADS = True  # a task's head stands above what is merged
EXPORTED = True
HEAD = ("pooler", "classifier")


def check(suite: Mapping) -> None:
    """Raise ValueError for a value of the suite's own keys that is not legal."""
    one_of("suite.head", suite["head"], HEAD)
    rate = suite["corrupted"]
    if rate is not None and not (type(rate) in (int, float) and 0 < rate <= 1):
        raise Mistake(f"suite.corrupted must be in (0, 1] or null, got {rate!r}")


def identity(suite: Mapping) -> dict:
    """The suite's own keys that change a number."""
    rate = suite["corrupted"]
    return {"head": suite["head"]} | ({"corrupted": rate} if rate else {})  # ids without it are older than it


def task_identity(task: Mapping, *, training: bool) -> dict:
    """What a task's own keys stand for, beside their values.

    Args:
        training: only what trains an expert counts.
    """
    return {"probe": source.code(PROBE)} if task.get("probe") and not training else {}


def needs(suite: Mapping, folders: Mapping) -> list[str]:
    """What must be there before anything runs, for a person; nothing where an ordinary machine will do."""
    return []


def learned(task: "Task") -> tuple[str, str]:
    """What the learning curve of an expert shows: its loss with the unit, and its metric."""
    loss = "squared error" if task.classes is None else "cross-entropy (nats)"
    return loss, task.metrics[0]
