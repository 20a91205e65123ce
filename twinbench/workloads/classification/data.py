"""Reading a classification task: rows of text with labels in three splits, checked."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from transformers import PreTrainedTokenizerBase

from twinbench.suite import SPLIT_SEED, Task
from twinbench.system.mistakes import Mistake, mistakes
from twinbench.tasks.metrics import check_fit


@dataclass(frozen=True)
class Spec:
    """What a task file says beside where its rows come from.

    Attributes:
        columns, classes, metrics, max_length, head, probe: as in `Task`; ``classes`` is null for a regression.
        rows: of train, validation and test; None takes what is there (for train: what validation leaves).
    """

    columns: list[str]
    classes: list[str] | None
    metrics: list[str]
    max_length: int
    rows: Mapping[str, int | None]
    head: str | None = None
    probe: bool | None = None


def read(
    name: str,
    config: Mapping,
    sources: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    split: str,
) -> Task:
    """Read a task of a resolved suite from its local sources."""
    spec = Spec(**{key: value for key, value in config.items() if key not in ("sources", "data", "finetune")})
    return load_task(name, spec, instantiate(config["data"]), sources, limit, split)


def load_task(
    name: str,
    spec: Spec,
    data: Callable[..., dict[str, pd.DataFrame]],
    sources: Mapping[str, Path],
    limit: int | None = None,
    split: str = "test",
) -> Task:
    """Read a task, hold validation rows out of its training data, and check everything that can be wrong with it.

    Args:
        data: gives ``train`` and ``test`` frames from the local ``sources``, and others to be scored beside ``test``.
            A class label is an id or one of the names in ``classes``.
        limit: of what is scored, at most the first so many rows.
        split: that is scored; what the loader gives beside train and test is scored with the test.

    Raises:
        ValueError: classes that are not two names or more, a metric that is unknown or for another kind of task, a
            missing column, an empty or too small split, or a label that is no class of the task or no number.
    """
    columns, classes, rows = spec.columns, spec.classes, spec.rows
    if classes is not None and len(set(classes)) < max(2, len(classes)):
        raise Mistake(f"task {name}: classes must be two different names or more, or null; got {list(classes)}")
    check_fit(spec.metrics, classes, f"task {name}")
    with mistakes():
        given = data(**sources)
    frames = {split: _checked(name, split, frame, columns, classes) for split, frame in given.items()}
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
    splits |= further
    scored = [split, *(further if split == "test" else [])]
    splits |= {part: splits[part].iloc[:limit] for part in scored}
    splits = {part: frame.reset_index(drop=True) for part, frame in splits.items()}
    kinds = tuple(classes) if classes else None
    return Task(name, tuple(columns), kinds, tuple(spec.metrics), spec.max_length, splits, spec.head, bool(spec.probe))


def encoded(tokenizer: PreTrainedTokenizerBase, task: Task, split: str, count: int):
    """Token ids of the first rows of a split, as the tokenizer gives them."""
    texts = [task.splits[split][column].tolist()[:count] for column in task.columns]
    return tokenizer(*texts, truncation=True, max_length=task.max_length)


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
    if not classes and len(set(labels)) == 1 < len(labels):
        raise Mistake(f"{who}: all labels are {labels[0]}, as where a test has none")
    return frame.assign(label=np.array(labels, dtype="int64" if classes else "float64"))
