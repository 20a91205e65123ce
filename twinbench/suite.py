"""The nouns: a task, a suite of a base with its experts and tasks, and the kind of model that it is of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from twinbench.weights.state_dict import StateDict

if TYPE_CHECKING:  # it takes seconds to import
    from transformers import PreTrainedTokenizerBase

SPLIT_SEED = 0  # of the split into training and validation rows; part of the protocol, not of a run


@dataclass(frozen=True, eq=False)
class Task:
    """Rows of text with labels in splits, and the metrics that score them.

    Attributes:
        columns: one text column, or two for sentence pairs.
        classes: names by class id, or None where there are none (a regression, or a generation).
        metrics: the first is the primary one.
        splits: ``train`` (experts), ``validation`` (held out of the training data, for routers and choices), ``test``,
            and under other names what is scored beside it.
        head: for a task without an expert of its own, the task whose head scores it; None: its own expert's.
        harness: per split what else scores it; None: labels and predictions are all.
        subsets: per split that does not hold all documents which of them it holds, in words.
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


@dataclass(frozen=True, eq=False)
class Suite:
    """One base, its experts and their tasks, opened and checked; tensors are read when they are asked for.

    Attributes:
        base: the weights that are merged, under the names that they have in the module that runs them.
        experts: what is merged: per task, in the order of ``tasks``, its expert's weights under the same names. The
            other tasks are unseen: they are only scored.
        heads: per task what stands above those weights and is never merged. A task without an expert borrows the head
            of the task named in its ``head``. Empty where the kind of model has no heads.
        workload: the kind of model: a module ``twinbench.workloads.NAME.workload`` (see there for what it offers).
        factored: experts are LoRA adapters that stay factors (`twinbench.merging.factored`).
        dtype, device_map: of the module; "auto" spreads its layers over all GPUs.
        adapter_bytes: what the experts take on disk where all of them are LoRA adapters.
    """

    name: str
    base_folder: Path
    base: StateDict
    experts: Mapping[str, StateDict]
    heads: Mapping[str, StateDict]
    tasks: Mapping[str, Task]
    tokenizer: "PreTrainedTokenizerBase"
    workload: ModuleType
    factored: bool = False
    dtype: str = "float32"
    device_map: str | None = None
    adapter_bytes: int | None = None
