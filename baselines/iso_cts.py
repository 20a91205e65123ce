"""Iso-CTS: "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", Marczak et al.,
ICML 2025, arXiv 2502.04959.

As Iso-C (`baselines.iso_c`), with directions kept for single tasks. Of a matrix with smaller side r, each of T tasks
gets n = round((1 - common) r / T) directions and the sum of the task vectors k = r - n T. U_c S_c V_c^T is the sum's
leading part, U_t S_t V_t^T that of ``(I - U_c U_c^T) tau_t``::

    shared = base + scaling * s polar([U_1 .. U_T, U_c]) polar([V_1 .. V_T, V_c])^T

where s is the mean of all these singular values and polar(P D Q^T) = P Q^T. The paper's alpha is ``scaling``. Tensors
that are no matrices move by ``scaling`` times the mean task vector.

Departures from the authors' code: those of Iso-C.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.merging.spectral import matrixwise, polar, triplets


def merge(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, scaling: float, common: float
) -> Merged:
    """Join the directions of the summed matrix and of each task, with one singular value for all.

    Args:
        common: share of the directions that the tasks' sum gets, in [0, 1].

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if not 0 <= common <= 1:
        raise ValueError(f"common must be in [0, 1], got {common}")

    def solve(vectors: list[Tensor]) -> Tensor:
        whole = min(vectors[0].shape)
        own = round((whole - int(common * whole)) / len(vectors))
        total, together = sum(vectors), whole - own * len(vectors)
        shared = triplets(total, max(1, together)) if together > 0 else triplets(torch.zeros_like(total))
        found = [shared]
        if own:
            rests = [vector - shared.left @ (shared.left.T @ vector) for vector in vectors]
            found = [*(triplets(rest, own) for rest in rests), shared]
        left = polar(torch.cat([each.left for each in found], dim=1))
        right = polar(torch.cat([each.right for each in found]))
        return float(torch.cat([each.values for each in found]).sum()) / whole * (left @ right)

    return Merged(matrixwise(base, experts, solve, scaling))
