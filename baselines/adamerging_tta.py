"""AdaMerging as its authors run it: adapted to the inputs that are scored (test-time adaptation).

"AdaMerging: Adaptive Model Merging for Multi-Task Learning", Yang et al., ICLR 2024, arXiv 2310.02575. All else is
`baselines.adamerging`. A model that has read the test's inputs is no rival of one that has not, so its rows have a
table of their own.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from baselines import adamerging
from twinbench.merging.merged import Merged


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    granularity: str,
    density: float,
    start: float,
    steps: int,
    lr: float,
    rows: int,
    size: int,
    seed: int,
    scored_entropy: Callable[[Mapping[str, Tensor], str, int, int, torch.Generator], Mapping[str, Tensor]],
) -> Merged:
    """As `adamerging.merge`, on the test's inputs.

    Args:
        scored_entropy: the gradient of the mean entropy of drawn test inputs of a task by each merged tensor.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    return adamerging.merge(
        base,
        experts,
        granularity=granularity,
        density=density,
        start=start,
        steps=steps,
        lr=lr,
        rows=rows,
        size=size,
        seed=seed,
        entropy=scored_entropy,
    )
