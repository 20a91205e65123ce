"""Model Breadcrumbs: "Scaling Multi-Task Model Merging with Sparse Masks", Davari and Belilovsky, ECCV 2024,
arXiv 2312.06795.

Of each row of a task vector the largest values are taken for outliers and the small ones for noise; both are dropped::

    shared = base + scaling * sum_t m_t * (expert_t - base)

m_t is 0 at the floor(outliers * n) largest of a row's n magnitudes and 1 at the ``density`` largest share of the rest.
Rows run along the last dimension; a vector is one row. The paper's alpha is ``scaling``, its beta 1 - ``density``, its
gamma 1 - ``outliers``. mergekit takes a whole tensor for one row.

Departures: ``density`` is a share of what the outliers leave, where the code counts the whole row; at least one value
of a row is kept; a tensor without dimensions stays the base's.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    density: float,
    outliers: float,
    scaling: float,
) -> Merged:
    """Drop outliers and noise of each row, and add what is left.

    Args:
        density: share kept of what are no outliers, in (0, 1].
        outliers: share of each row that is dropped as too large, in [0, 1).

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if not 0 <= outliers < 1:
        raise ValueError(f"outliers must be in [0, 1), got {outliers}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")

    def merged(name: str) -> Tensor:
        origin = base[name]
        if not origin.is_floating_point() or origin.dim() == 0:
            return origin
        total = torch.zeros_like(origin, dtype=torch.float32)
        for expert in experts.values():
            total += crumbs(expert[name].float() - origin.float(), density, outliers)
        return torch.add(origin.float(), total, alpha=scaling).to(origin.dtype).contiguous()

    return Merged(StateDict(base, merged))


def crumbs(vector: Tensor, density: float, outliers: float) -> Tensor:
    """A task vector's tensor with the largest and the small values of each row set to 0."""
    length = vector.shape[-1]
    dropped = int(outliers * length)
    kept = max(1, round(density * (length - dropped)))
    order = vector.abs().topk(min(length, dropped + kept), dim=-1).indices[..., dropped:]
    return torch.zeros_like(vector).scatter(-1, order, vector.gather(-1, order))
