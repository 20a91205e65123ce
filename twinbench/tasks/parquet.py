"""Tasks on parquet files: your own data, a folder under TWINBENCH_DATA, or a dataset of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

SCORED = ("test", "also")  # they choose what is scored; an expert does not depend on them


def columns(
    *, folder: Path, train: str, test: str, also: Sequence[str] = (), label: str = "label"
) -> dict[str, pd.DataFrame]:
    """Read splits as they are: all columns, in the file's order, repeats included.

    Args:
        folder: holds ``SPLIT.parquet``, or the hub's ``SPLIT-00000-of-00002.parquet`` and so on.
        train: name of the split to train on.
        test: name of the split to score, e.g. ``validation`` where the official test has no labels.
        also: further splits to score, under their own names; those that are there.
        label: name of the label column; it is renamed to ``label``, and holds int64 class ids or float64 values.

    Raises:
        FileNotFoundError: a split or one of its shards is not there.
        ValueError: no such label column.
    """
    further = {split: _read(folder, split, label) for split in also if any(_named(folder, split))}
    return {"train": _read(folder, train, label), "test": _read(folder, test, label)} | further


def _read(folder: Path, split: str, label: str) -> pd.DataFrame:
    frame = pd.concat([pd.read_parquet(file) for file in _files(folder, split)], ignore_index=True)
    if label not in frame:
        raise ValueError(f"{folder}, split {split}: no label column {label}; it has {', '.join(frame.columns)}")
    labels = frame.pop(label)  # before another column of the name "label", if there is one, is replaced
    if pd.api.types.is_bool_dtype(labels) or pd.api.types.is_integer_dtype(labels):
        labels = labels.astype("int64")
    elif pd.api.types.is_float_dtype(labels):
        labels = labels.astype("float64")
    return frame.assign(label=labels)


def _named(folder: Path, split: str) -> list[Path]:
    """What there is of a split's files, in order."""
    whole = folder / f"{split}.parquet"
    return [whole] if whole.is_file() else sorted(folder.glob(f"{split}-?????-of-?????*.parquet"))


def _files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split in order, all of them."""
    shards = _named(folder, split)
    if [file.name for file in shards] == [f"{split}.parquet"]:
        return shards
    wanted = int(shards[0].name.removeprefix(f"{split}-")[9:14]) if shards else 1
    if len(shards) != wanted:
        there = ", ".join(sorted(file.name for file in folder.glob("*.parquet"))[:20]) or "no parquet file"
        raise FileNotFoundError(f"{folder}: split {split} needs {wanted} file(s), got {len(shards)}; there is {there}")
    return shards
