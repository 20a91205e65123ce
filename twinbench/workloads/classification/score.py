"""Scoring a classification task: one forward pass over a split, predictions, metrics."""

import time
from contextlib import nullcontext

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from twinbench.merging.merged import for_every_input, with_route
from twinbench.routing.attach import attach
from twinbench.routing.batch import Routes, merges_each
from twinbench.routing.features import encodings, in_batches
from twinbench.routing.layerwise import gated
from twinbench.routing.learned import Setting, applied
from twinbench.tasks.metrics import predictions
from twinbench.tasks.metrics import score as metric_score
from twinbench.workbench import Workbench, merged
from twinbench.workloads.classification import probe
from twinbench.workloads.classification.open import classifier


def score(
    bench: Workbench, setting: Setting, task: str, split: str, chosen: np.ndarray | None
) -> tuple[dict[str, float], pd.DataFrame, float, dict]:
    """Score a split of a task.

    Args:
        chosen: the task whose head the router picked for each row, (n,); None where the head is known. A row that was
            sent to another task's head counts as wrong: class -1, or for a regression the mean training label.

    Returns:
        The task's metrics, the primary one first; row, label and prediction of every row; the seconds of the pass; and
        nothing more for the records.
    """
    spec = bench.suite.tasks[task]
    logits, seconds = _logits(bench, setting, task, split)
    labels, classes = spec.labels(split).astype(float), spec.classes is not None
    if spec.probe:
        train, _ = _logits(bench, setting, task, "train")
        prediction = probe.predictions(train.numpy(), spec.labels("train"), logits.numpy(), classes)
    else:
        prediction = predictions(logits.numpy(), classes)
    if chosen is not None:
        astray = -1.0 if spec.classes else float(spec.labels("train").mean())
        prediction = np.where(chosen != task, astray, prediction)
    frame = pd.DataFrame({"row": range(len(prediction)), "label": labels, "prediction": prediction})
    return {metric: metric_score(metric, labels, prediction) for metric in spec.metrics}, frame, seconds, {}


def _logits(bench: Workbench, setting: Setting, task: str, split: str) -> tuple[Tensor, float]:
    """`_forward`, remembered."""
    return bench.remember(("logits", setting, task, split), lambda: _forward(bench, setting, task, split))


def _forward(bench: Workbench, setting: Setting, task: str, split: str) -> tuple[Tensor, float]:
    """Logits (n, outputs) of a task's rows in a split under the merged model, and the seconds that it took."""
    suite = bench.suite
    made, _ = merged(bench, setting.method, setting.gold_biases)
    own = {name: suite.experts[task][name] for name in suite.base if name not in made.shared}
    weights = applied(bench, setting, task, split)
    encodings(bench, task, split)  # to tokenize is no part of the pass, and runs share it
    start = time.perf_counter()
    if weights is None:
        with (
            bench.answering({**for_every_input(made), **own}) as module,
            gated(module, made) if made.gates else nullcontext(),
        ):
            logits = forward(bench, classifier(suite, task, module), task, split)
        return logits, time.perf_counter() - start
    distinct, group = weights.unique(dim=0, return_inverse=True)
    if not merges_each(len(distinct), *weights.shape):
        tolerance = setting.router.use.tolerance if setting.router else 0.0
        with bench.answering(made.shared | own) as module, attach(module, made, tolerance) as routes:
            logits = forward(bench, classifier(suite, task, module), task, split, routes=(routes, weights))
        return logits, time.perf_counter() - start
    logits = None
    for number, route in enumerate(distinct):  # a handful of routes: each is merged once and is a static model
        rows = (group == number).nonzero().flatten()
        with bench.answering(with_route(made, route.tolist()) | own) as module:
            found = forward(bench, classifier(suite, task, module), task, split, rows.tolist())
        logits = found.new_empty(len(weights), found.shape[1]) if logits is None else logits
        logits[rows] = found
    return logits, time.perf_counter() - start


@torch.no_grad()
def forward(
    bench: Workbench,
    model: nn.Module,
    task: str,
    split: str,
    rows: list[int] | None = None,
    routes: tuple[Routes, Tensor] | None = None,
) -> Tensor:
    """Run a sequence classifier over rows of a split.

    Args:
        model: the bench's module under a head (`open.classifier`).
        rows: which ones, and in what order the results come; None is all of them.
        routes: of the parts attached to the model, with their weights (n, experts) for these rows.

    Returns:
        Logits (n, outputs), float32 on the CPU.
    """
    rows = list(range(len(bench.suite.tasks[task].splits[split]))) if rows is None else rows

    def logits(batch: dict, chosen: list[int]) -> Tensor:
        if routes is not None:
            routes[0].weights = routes[1][chosen]
        return model(**batch).logits

    # neighbours with one route share their matrix products
    order = None if routes is None else lambda at: int(routes[1][at].argmax())
    return in_batches(bench, logits, task, split, rows, order)
