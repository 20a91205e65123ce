"""What Fisher information and Gram matrices need of a sequence classifier: its rows, its head, its likelihood."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from twinbench.suite import Task
from twinbench.system.mistakes import Mistake
from twinbench.workloads.classification.data import encoded
from twinbench.workloads.classification.open import classifier


def model(bench, task: str) -> nn.Module:
    """The bench's module, whatever it holds, under the task's head."""
    return classifier(bench.suite, task, bench.module)


def batches(bench, task: str, split: str, rows: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The first rows of a split as padded inputs of a model, short texts first, on the bench's device.

    Raises:
        ValueError: the split has fewer rows.
    """
    spec, tokenizer = bench.suite.tasks[task], bench.suite.tokenizer
    frame = spec.splits[split]
    if rows > len(frame):
        raise Mistake(f"task {task}: rows must be in [1, {len(frame)}], the rows of its {split} split; got {rows}")
    inputs = encoded(tokenizer, spec, split, rows)
    order = sorted(range(rows), key=lambda row: len(inputs["input_ids"][row]))
    for start in range(0, rows, batch_size):
        chosen = order[start : start + batch_size]
        batch = {key: [column[row] for row in chosen] for key, column in inputs.items()}
        yield dict(tokenizer.pad(batch, return_tensors="pt").to(bench.device))


def log_likelihoods(model: nn.Module, batch: dict[str, Tensor], task: Task) -> tuple[Tensor, Tensor]:
    """Weights and values (n, k) whose ``sum_k weight_k * (d value_k / d theta)^2`` is a row's Fisher information.

    For classes these are p_k and log p_k: the expectation over the labels that the model predicts. For a regression it
    is the prediction itself with weight 1: the expectation over a Gaussian of unit variance around it.
    """
    logits = model(**batch).logits.float()
    if task.classes is None:
        return torch.ones_like(logits), logits
    values = logits.log_softmax(-1)
    return values.detach().exp(), values
