"""What a wrong route costs, for a router that minimizes the expected loss of score instead of its errors.

Rows lost to another expert do not cost alike. Under a classification head another expert's features are a guess; under
a regression head they are an outlier, and a correlation suffers more from one outlier than an accuracy from one error.
The Bayes decision is ``argmin_e sum_t p(t | x) C[t, e]`` with p the router's probabilities and C these costs.
"""

import time

import numpy as np
import torch
from torch import Tensor

from twinbench.suite import Task
from twinbench.system.mistakes import Mistake
from twinbench.tasks.metrics import predictions, score
from twinbench.workbench import Workbench
from twinbench.workloads.classification.open import classifier
from twinbench.workloads.classification.score import forward

# Misroute every 10th row, about a router's error rate: a correlation does not fall linearly with that share.
STRIDE = 10


def costs(bench: Workbench) -> tuple[Tensor, float]:
    """What a task loses when rows of it go to the expert of another, on the experts' held-out rows.

    Returns:
        C (experts, experts), float32 on the CPU: C[t, e] is the fraction of task t's score that is lost per fraction of
        its rows that run through expert e with t's head; 0 on the diagonal. And the seconds that it took.

    Raises:
        ValueError: an expert scores nothing on its own task, so there is nothing to lose.
    """
    start, suite = time.perf_counter(), bench.suite
    experts = list(suite.experts)
    predicted = {task: [] for task in experts}
    for expert in experts:
        with bench.answering(dict(suite.experts[expert].items())) as module:
            for task in experts:
                logits = forward(bench, classifier(suite, task, module), task, "validation")
                predicted[task].append(predictions(logits.numpy(), suite.tasks[task].classes is not None))
    found = torch.zeros(len(experts), len(experts))
    for row, task in enumerate(experts):
        found[row] = torch.tensor(_lost(suite.tasks[task], predicted[task], row))
    return found, time.perf_counter() - start


def _lost(spec: Task, predicted: list[np.ndarray], own: int) -> list[float]:
    """Per expert the fraction of a task's score that is lost per fraction of its rows that the expert gets.

    Args:
        predicted: the held-out predictions under each expert.
        own: the task's own expert.
    """
    labels = spec.labels("validation").astype(float)
    kept = score(spec.metrics[0], labels, predicted[own])
    if not kept > 0:
        raise Mistake(f"router.use.minimum_risk: the expert of {spec.name} scores {kept:.4f} on its own held-out rows")
    found = []
    for other in predicted:
        astray = (np.where(np.arange(len(labels)) % STRIDE == at, other, predicted[own]) for at in range(STRIDE))
        left = np.mean([score(spec.metrics[0], labels, mixed) for mixed in astray])
        found.append(STRIDE * (1 - left / kept))
    return found
