"""Running a classifier over a split: logits, and the router's features."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from twinbench.routed import Routes
from twinbench.suite import Suite


@lru_cache(maxsize=64)
def encoded(suite: Suite, task: str, split: str) -> list[dict[str, list[int]]]:
    """Token ids of every row of a split, truncated to the task's max_length."""
    spec = suite.tasks[task]
    texts = [spec.splits[split][column].tolist() for column in spec.columns]
    batch = suite.tokenizer(*texts, truncation=True, max_length=spec.max_length)
    return [dict(zip(batch.keys(), row, strict=True)) for row in zip(*batch.values(), strict=True)]


@torch.inference_mode()
def logits(
    model: nn.Module,
    suite: Suite,
    task: str,
    split: str,
    *,
    batch_size: int,
    routes: Routes | None = None,
    weights: Tensor | None = None,
) -> np.ndarray:
    """Logits (n, outputs) of a split, in its order.

    Args:
        routes: of the exclusive parts attached to the model, if there are any.
        weights: (n, experts) router weights of the split's rows, with ``routes``.
    """
    found = None
    for rows, batch in _batches(suite, task, split, batch_size, model.device):
        if routes is not None:
            routes.weights = weights[rows].to(model.device)
        out = model(**batch).logits.float().cpu().numpy()
        found = np.empty((len(encoded(suite, task, split)), out.shape[1]), np.float32) if found is None else found
        found[rows] = out
    return found


@torch.inference_mode()
def features(backbone: nn.Module, suite: Suite, task: str, split: str, *, batch_size: int) -> Tensor:
    """Mean of the last hidden states over a row's tokens, special ones included: (n, hidden), in the split's order."""
    found = None
    for rows, batch in _batches(suite, task, split, batch_size, backbone.device):
        hidden = backbone(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        found = mean.new_empty(len(encoded(suite, task, split)), mean.shape[1]) if found is None else found
        found[rows] = mean
    return found.clone()


def _batches(suite: Suite, task: str, split: str, batch_size: int, device) -> Iterator[tuple[list[int], dict]]:
    """Row numbers and padded inputs; rows of like length go together, so that little is padded."""
    rows = encoded(suite, task, split)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    with tqdm(total=len(rows), desc=f"{task} {split}", unit="row", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = suite.tokenizer.pad([rows[row] for row in chosen], return_tensors="pt")
            yield chosen, batch.to(device)
            bar.update(len(chosen))
