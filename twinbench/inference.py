"""Running a classifier over a split: logits, and the router's features."""

from functools import lru_cache

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
def forward(
    model: nn.Module,
    suite: Suite,
    task: str,
    split: str,
    rows: list[int] | None = None,
    *,
    batch_size: int,
    routes: Routes | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a sequence classifier over rows of a split.

    Args:
        rows: which ones, and in what order the results come; None is all of them.
        routes: of the exclusive parts attached to the model, if there are any.
        weights: (n, experts) router weights of these rows, with ``routes``.

    Returns:
        Logits (n, outputs), and the backbone's features (n, hidden): the mean of the last hidden states over a row's
        tokens, special ones included. Both float32 on the CPU.
    """
    encodings = encoded(suite, task, split)
    rows = list(range(len(encodings))) if rows is None else rows
    order = sorted(range(len(rows)), key=lambda at: len(encodings[rows[at]]["input_ids"]))  # like lengths: less padding
    hidden = []
    hook = model.base_model.register_forward_hook(lambda _, inputs, output: hidden.append(output.last_hidden_state))
    logits, features = [None] * len(rows), [None] * len(rows)
    try:
        with tqdm(total=len(rows), desc=f"{task} {split}", unit="row", leave=False) as bar:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                if routes is not None:  # neighbours with one route share their matrix products
                    chosen.sort(key=lambda at: int(weights[at].argmax()))
                batch = suite.tokenizer.pad([encodings[rows[at]] for at in chosen], return_tensors="pt").to(
                    model.device
                )
                if routes is not None:
                    routes.weights = weights[chosen]
                out = model(**batch).logits.float().cpu()
                mask = batch["attention_mask"][..., None]
                means = ((hidden.pop().float() * mask).sum(1) / mask.sum(1)).cpu()
                for at, row_logits, row_features in zip(chosen, out, means, strict=True):
                    logits[at], features[at] = row_logits, row_features
                bar.update(len(chosen))
    finally:
        hook.remove()
    return torch.stack(logits), torch.stack(features)
