"""The documents of the four generative tasks, in splits that have none in common; lm-eval calls these functions.

By hand: ``lm_eval --include_path twinbench/tasks/lm_eval --tasks twinbench_bbq --metadata '{"folder": "FOLDER"}' ...``
A folder holds ``SPLIT.parquet``, or the hub's ``SPLIT-00000-of-00002.parquet`` and so on.
"""

from pathlib import Path

import numpy as np
from datasets import Dataset

SEED = 0  # of the partition of what has one split only; part of the protocol, not of a run
SHOTS = 5  # MMLU's, of a question's own subject


def mmlu(folder: str, **_) -> dict[str, Dataset]:
    """MMLU with the five ``dev`` questions of its subject beside each question.

    ``train`` (without examples: they would be most of its tokens) and ``validation`` are halves of the official
    validation split, ``test`` is the official test.
    """
    shots = {}
    for doc in _read(folder, "dev"):
        shots.setdefault(doc["subject"], []).append({key: doc[key] for key in ("question", "choices", "answer")})

    def shown(docs: Dataset) -> Dataset:
        return docs.add_column("shots", [shots.get(subject, [])[:SHOTS] for subject in docs["subject"]])

    train, validation = _parts(_read(folder, "validation"), (0.7, 0.3))
    return {"train": train, "validation": shown(validation), "test": shown(_read(folder, "test"))}


def truthful_qa(folder: str, **_) -> dict[str, Dataset]:
    """TruthfulQA's one split in three parts: 40 % to train, 10 % held out, 50 % to test."""
    return dict(zip(("train", "validation", "test"), _parts(_read(folder, "validation"), (0.4, 0.1, 0.5)), strict=True))


def bbq(folder: str, **_) -> dict[str, Dataset]:
    """BBQ in three parts as `truthful_qa`; the questions of one template, which differ in a word, stay together."""
    docs = _read(folder, "test")
    templates = [
        f"{category} {index}" if index else f"{category} {question}"
        for category, index, question in zip(docs["category"], docs["question_index"], docs["question"], strict=True)
    ]
    return dict(zip(("train", "validation", "test"), _parts(docs, (0.4, 0.1, 0.5), templates), strict=True))


def cnn_dailymail(folder: str, **_) -> dict[str, Dataset]:
    """CNN/DailyMail's own three splits."""
    return {split: _read(folder, split) for split in ("train", "validation", "test")}


def _read(folder: str, split: str) -> Dataset:
    files = sorted(Path(folder).glob(f"{split}.parquet")) or sorted(
        Path(folder).glob(f"{split}-?????-of-?????*.parquet")
    )
    if not files:
        there = ", ".join(sorted(file.name for file in Path(folder).glob("*.parquet"))) or "no parquet file"
        raise FileNotFoundError(f"{Path(folder).name}: no file of split {split}; there is {there}")
    return Dataset.from_parquet([str(file) for file in files], keep_in_memory=True)


def _parts(docs: Dataset, shares: tuple[float, ...], groups: list[str] | None = None) -> list[Dataset]:
    """Disjoint parts of about these shares, by a seeded draw of documents, or of whole groups of them."""
    names = groups or [str(row) for row in range(len(docs))]
    order = np.random.default_rng(SEED).permutation(sorted(set(names)))
    ends = np.round(np.cumsum(shares) * len(order)).astype(int)
    part = {name: int(np.searchsorted(ends, place, side="right")) for place, name in enumerate(order)}
    return [docs.select([row for row, name in enumerate(names) if part[name] == p]) for p in range(len(shares))]
