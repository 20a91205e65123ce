"""The nouns: a task, a suite of a base with its experts and tasks, and the kind of model that it is of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from twinbench.weights.state_dict import StateDict

if TYPE_CHECKING:  # they take seconds to import
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

CONTENT = "content"  # column of what a prompt is about, without its task's words around it
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
        probe: it has no expert and no head; a linear probe on the merged model's features, fitted on ``train``, scores
            it.
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
    probe: bool = False
    harness: Mapping[str, Any] | None = None
    subsets: Mapping[str, str] = field(default_factory=dict)

    def labels(self, split: str) -> np.ndarray:
        return self.splits[split]["label"].to_numpy()

    def scored(self, split: str) -> list[str]:
        """The splits that are scored where ``split`` is asked for: that one first, and those beside the test."""
        further = [name for name in self.splits if name not in ("train", "validation", "test")]
        return [split, *(further if split == "test" else [])]


class Workload(Protocol):
    """A kind of model: the module ``twinbench.workloads.NAME.workload``, whose functions these are.

    A kind may lack those after ``score``: methods and routers that ask for one then refuse its suites by name. What a
    plan knows of it, without torch, is in ``settings.py`` beside it.
    """

    Recipe: type  # how an expert is fine-tuned: a dataclass of the keys of ``finetune``

    def open_tokenizer(self, folder: Path) -> "PreTrainedTokenizerBase": ...

    def read(
        self, name: str, config: Mapping, sources: Mapping[str, Path], tokenizer, limit: int | None, split: str
    ) -> Task:
        """A task of a resolved suite, from its local sources, with at most ``limit`` rows of the split to be scored."""

    def finetune(self, base: Path, task: Task, recipe, folder: Path, device: str, words: Path) -> Path:
        """The folder with the expert of a task, fine-tuned unless it is there."""

    def open_suite(
        self, base: Path, experts: Mapping[str, Path], tasks: Mapping[str, Task], tokenizer, settings: Mapping, kind
    ) -> "Suite":
        """The checkpoints, opened and checked against each other and the tasks."""

    def module(self, suite: "Suite", device: str) -> "nn.Module":
        """The module that merged weights are put into."""

    def encoded(self, tokenizer, task: Task, split: str, count: int) -> Mapping:
        """Token ids of the first rows of a split: what a router reads."""

    def score(self, bench, setting, task: str, split: str, chosen: np.ndarray | None) -> tuple:
        """Metrics, a frame of predictions, seconds, and what else goes into the records."""

    def costs(self, bench) -> tuple:
        """What it costs to run a row of one task through the expert of another, and the seconds to find out."""

    def batches(self, bench, task: str, split: str, rows: int, batch_size: int) -> Iterator:
        """The first rows of a split as inputs of a model."""

    def model(self, bench, task: str) -> "nn.Module":
        """The bench's module as a whole model for a task."""

    def log_likelihoods(self, model: "nn.Module", batch: Mapping, task: Task) -> tuple:
        """Weights and values whose squared gradients are the Fisher information of a row."""

    def classifier(self, suite: "Suite", task: str, module: "nn.Module") -> "nn.Module":
        """The module under a task's head, as it is exported."""

    def forward(self, bench, model: "nn.Module", task: str, split: str, rows: list[int]) -> "Tensor":
        """Logits of rows under an exported model."""


@dataclass(frozen=True, eq=False)
class Suite:
    """One base, its experts and their tasks, opened and checked; tensors are read when they are asked for.

    Attributes:
        base: the weights that are merged, under the names that they have in the module that runs them.
        experts: what is merged: per task, in the order of ``tasks``, its expert's weights under the same names. The
            other tasks are unseen: they have no expert here.
        heads: per task what stands above those weights and is never merged. A task without an expert borrows the head
            of the task named in its ``head``. Empty where the kind of model has no heads.
        workload: the kind of model.
        scored: the tasks that are scored; None: all.
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
    workload: Workload
    scored: Sequence[str] | None = None
    factored: bool = False
    dtype: str = "float32"
    device_map: str | None = None
    adapter_bytes: int | None = None
