"""What a wrong route costs, for a router that minimizes the expected loss of score instead of its errors.

Rows lost to another expert do not cost alike. Under a classification head another expert's features are a guess; under
a regression head they are an outlier, and a correlation suffers more from one outlier than an accuracy from one error.
The Bayes decision is ``argmin_e sum_t p(t | x) C[t, e]`` with p the router's probabilities and C these costs.
"""

import time
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from twinbench.routing.features import forward, predictions
from twinbench.suite import Suite, backbone, classifier, load
from twinbench.system.mistakes import Mistake
from twinbench.tasks.metrics import score

# Each so many-th row is sent astray: a correlation is not linear in their share, and routers lose about one row in ten.
STRIDE = 10


@lru_cache(maxsize=4)
def costs(suite: Suite, device: str, batch_size: int) -> tuple[Tensor, float]:
    """What a task loses when rows of it go to the expert of another, on the experts' held-out rows.

    Returns:
        C (experts, experts), float32 on the CPU: C[t, e] is the loss of t's normalized score, as a share of it, per
        share of t's rows that expert e gets under t's head; 0 on the diagonal. And the seconds that it took.

    Raises:
        ValueError: an expert scores nothing on its own task, so there is nothing to lose.
    """
    start, module, experts = time.perf_counter(), backbone(suite, device), list(suite.experts)
    predicted = {task: [] for task in experts}
    for expert in experts:
        load(module, dict(suite.experts[expert].items()))
        for task in experts:
            model = classifier(suite, task, module)
            logits = forward(model, suite, task, "validation", batch_size=batch_size)
            predicted[task].append(predictions(logits, suite.tasks[task]))
    found = torch.zeros(len(experts), len(experts))
    for row, task in enumerate(experts):
        spec = suite.tasks[task]
        labels, own = spec.labels("validation").astype(float), predicted[task][row]
        kept = score(spec.metrics[0], labels, own)
        if not kept > 0:
            raise Mistake(f"router.minimum_risk: the expert of {task} scores {kept:.4f} on its own held-out rows")
        for column, other in enumerate(predicted[task]):
            astray = (np.where(np.arange(len(own)) % STRIDE == at, other, own) for at in range(STRIDE))
            left = np.mean([score(spec.metrics[0], labels, mixed) for mixed in astray])
            found[row, column] = STRIDE * (1 - left / kept)
    return found, time.perf_counter() - start
