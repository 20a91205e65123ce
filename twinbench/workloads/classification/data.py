"""A task: rows of text with labels in three splits, and the metrics that score it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from twinbench.system.mistakes import Mistake, mistakes
from twinbench.tasks.metrics import check_fit

SPLIT_SEED = 0  # of the split into training and validation rows; part of the protocol, not of a run


@dataclass(frozen=True, eq=False)
class Task:
    """Attributes:
    columns: one text column, or two for sentence pairs.
    classes: names by class id, or None for regression.
    metrics: the first is the primary one.
    head: for a task without an expert of its own, the task whose head scores it; None: its own expert's.
    splits: ``train`` (experts), ``validation`` (held out of the training data, for routers and choices), ``test``,
        and under other names what is scored beside it.
    harness: per split the lm-eval task that scores a generative task, whose column is ``prompt``; None: a classifier's.
    subsets: of generative tasks, per split that does not hold all documents which of them it holds, in words.
    """

    name: str
    columns: tuple[str, ...]
    classes: tuple[str, ...] | None
    metrics: tuple[str, ...]
    max_length: int
    splits: Mapping[str, pd.DataFrame]
    head: str | None = None
    harness: Mapping[str, Any] | None = None
    subsets: Mapping[str, str] = field(default_factory=dict)

    def labels(self, split: str) -> np.ndarray:
        return self.splits[split]["label"].to_numpy()

    def scored(self, split: str) -> list[str]:
        """The splits that are scored where ``split`` is asked for: that one first, and those beside the test."""
        further = [name for name in self.splits if name not in ("train", "validation", "test")]
        return [split, *(further if split == "test" else [])]


def load_task(
    data: Callable[..., dict[str, pd.DataFrame]],
    sources: Mapping[str, Path],
    *,
    name: str,
    columns: list[str],
    classes: list[str] | None,
    metrics: list[str],
    max_length: int,
    rows: Mapping[str, int | None],
    limit: int | None = None,
    head: str | None = None,
) -> Task:
    """Read a task, hold validation rows out of its training data, and check everything that can be wrong with it.

    Args:
        data: gives ``train`` and ``test`` frames from the local ``sources``, and others to be scored beside ``test``.
            A class label is an id or one of the names in ``classes``.
        rows: rows of train, validation and test; None takes what is there (for train: what validation leaves).
        limit: of what is scored, at most the first so many rows.

    Raises:
        ValueError: classes that are not two names or more, a metric that is unknown or for another kind of task, a
            missing column, an empty or too small split, or a label that is no class of the task or no number.
    """
    if classes is not None and len(set(classes)) < max(2, len(classes)):
        raise Mistake(f"task {name}: classes must be two different names or more, or null; got {list(classes)}")
    check_fit(metrics, classes, f"task {name}")
    with mistakes():
        read = data(**sources)
    frames = {split: _checked(name, split, frame, columns, classes) for split, frame in read.items()}
    train = frames["train"].iloc[np.random.default_rng(SPLIT_SEED).permutation(len(frames["train"]))]
    held_out = rows["validation"]
    splits = {
        "train": _first(train.iloc[held_out:], rows["train"], f"task {name}: train"),
        "validation": _first(train, held_out, f"task {name}: validation"),
        "test": _first(frames["test"], rows["test"], f"task {name}: test"),
    }
    further = {split: frame.iloc[: rows["test"]] for split, frame in frames.items() if split not in ("train", "test")}
    if limit is not None and limit < 1:
        raise Mistake(f"task {name}: limit must be at least 1 or null, got {limit}")
    scored = {split: frame.iloc[:limit] for split, frame in {"test": splits["test"], **further}.items()}
    splits = {split: frame.reset_index(drop=True) for split, frame in (splits | scored).items()}
    return Task(name, tuple(columns), tuple(classes) if classes else None, tuple(metrics), max_length, splits, head)


def _first(frame: pd.DataFrame, rows: int | None, who: str) -> pd.DataFrame:
    count = len(frame) if rows is None else rows
    if not 1 <= count <= len(frame):
        raise Mistake(f"{who}: rows must be in [1, {len(frame)}] or null, got {count}")
    return frame.iloc[:count]


def _checked(task: str, split: str, frame: pd.DataFrame, columns: list[str], classes: list[str] | None) -> pd.DataFrame:
    """The frame with class ids or finite numbers as its labels."""
    who = f"task {task}, split {split}"
    absent = [column for column in [*columns, "label"] if column not in frame]
    if absent:
        raise Mistake(f"{who}: no column {', '.join(absent)}; it has {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise Mistake(f"{who}: empty")
    for column in columns:
        if frame[column].isna().any():
            raise Mistake(f"{who}, row {int(frame[column].isna().argmax())}: {column} is missing")
    names = {name: place for place, name in enumerate(classes or ())}
    given = frame["label"].astype(object).where(frame["label"].notna(), None)
    labels = [names.get(label, label) if isinstance(label, str) else label for label in given]
    for row, label in enumerate(labels):
        if not (label in range(len(names)) if classes else isinstance(label, Real) and math.isfinite(label)):
            wanted = f"a class id in [0, {len(names) - 1}] or of {', '.join(names)}" if classes else "a finite number"
            raise Mistake(f"{who}, row {row}: label must be {wanted}; got {label!r}")
    return frame.assign(label=np.array(labels, dtype="int64" if classes else "float64"))
