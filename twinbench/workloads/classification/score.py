"""Scoring a classification task: one forward pass over a split, predictions, metrics."""

import time
from functools import lru_cache, partial

import numpy as np
import pandas as pd
from torch import Tensor

from twinbench.merging.merged import with_route
from twinbench.merging.method import Method, merge
from twinbench.routing import learned
from twinbench.routing.attach import attach
from twinbench.routing.features import encoded, forward, predictions
from twinbench.routing.learned import Setting
from twinbench.suite import Suite, backbone, classifier, load
from twinbench.tasks.metrics import score

SHARED = 24  # rows on average that share a route from which on merging it costs less than running its parts beside


def measure(
    suite: Suite,
    method: Method,
    route: str | None,
    setting: Setting,
    task: str,
    split: str,
    lost: np.ndarray | None,
) -> tuple[dict[str, float], pd.DataFrame, float]:
    """Score a split of a task.

    Args:
        route: as `learned.applied` takes it.
        lost: the rows that the router sent to another task's head, (n,); None under protocols that know the head. Such
            a row is wrong: its class is -1, its regression value the mean of the training labels, which is all that is
            known of a text nobody scored.

    Returns:
        The task's metrics, the primary one first; row, label and prediction of every row; the seconds of the pass.
    """
    logits, seconds = _forward(suite, method, route, setting, task, split)
    spec = suite.tasks[task]
    labels, prediction = spec.labels(split).astype(float), predictions(logits, spec)
    if lost is not None:
        prediction = np.where(lost, -1.0 if spec.classes else float(spec.labels("train").mean()), prediction)
    frame = pd.DataFrame({"row": range(len(prediction)), "label": labels, "prediction": prediction})
    return {metric: score(metric, labels, prediction) for metric in spec.metrics}, frame, seconds


@lru_cache(maxsize=128)
def _forward(
    suite: Suite, method: Method, route: str | None, setting: Setting, task: str, split: str
) -> tuple[Tensor, float]:
    """Run a task's rows in a split through the merged model: logits (n, outputs), and the seconds that it took."""
    merged, _ = merge(suite, method, setting.gold_biases)
    own = {name: suite.experts[task][name] for name in suite.base if name not in merged.shared}
    weights = learned.applied(suite, method, route, setting, task, split)
    encoded(suite, task, split)
    module = backbone(suite, setting.device)
    model = classifier(suite, task, module)
    run = partial(forward, model, suite, task, split, batch_size=setting.batch_size)
    start = time.perf_counter()
    if weights is None:
        load(module, merged.shared | own)
        logits = run()
    else:
        distinct, group = weights.unique(dim=0, return_inverse=True)
        if len(distinct) > max(len(suite.experts), len(weights) // SHARED):
            load(module, merged.shared | own)
            with attach(module, merged.exclusive, setting.router.tolerance) as routes:
                logits = run(routes=routes, weights=weights)
        else:  # a handful of routes, or groups of rows: merge each once and run its rows through a static model
            logits = None
            for number, route_weights in enumerate(distinct):
                rows = (group == number).nonzero().flatten()
                load(module, with_route(merged, route_weights.tolist()) | own)
                found = run(rows=rows.tolist())
                if logits is None:
                    logits = found.new_empty(len(weights), found.shape[1])
                logits[rows] = found
    return logits, time.perf_counter() - start
