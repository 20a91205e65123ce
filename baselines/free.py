"""FREE-Merging: "FREE-Merging: Fourier Transform for Efficient Model Merging", Zheng and Wang, ICCV 2025,
arXiv 2411.16815.

Beside a shared model (``method@shared=fr``) each task has a light expert, the largest values of each row of its task
vector, and a router weighs the experts: ``exclusive_t = rescale * top_density(expert_t - base)``. Rows run along the
last dimension; a vector is one row.

As in the authors' runner for GLUE, the rescaling is a number; their vision code computes it from the means of both.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.parts import Sparse, packed
from twinbench.weights.state_dict import StateDict

ROUTE = "router"


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    shared: Mapping[str, Tensor],
    density: float,
    rescale: float,
) -> Merged:
    """Keep each task's largest values for a router to weigh, beside a shared model.

    Args:
        shared: the shared model, of any static method.
        density: share of each row that an expert keeps, in (0, 1]; at least one value.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if not math.isfinite(rescale):
        raise ValueError(f"rescale must be finite, got {rescale}")
    names = [name for name in base if base[name].is_floating_point()]

    def part(task: str, name: str) -> Sparse:
        return largest(experts[task][name].float() - base[name].float(), density, rescale)

    return Merged(shared, {task: StateDict(names, lambda name, task=task: part(task, name)) for task in experts})


def largest(vector: Tensor, density: float, rescale: float) -> Sparse:
    """The largest magnitudes of each row, times a number; a vector is one row."""
    rows = vector.reshape(-1, vector.shape[-1]) if vector.dim() else vector.view(1, 1)
    order = rows.abs().topk(max(1, round(density * rows.shape[1])), dim=1).indices
    kept = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).flatten()
    return Sparse(rescale * vector.flatten()[kept], packed(kept), tuple(vector.shape))
