"""TSV-M: "Task Singular Vectors: Reducing Task Interference in Model Merging", Gargiulo et al., CVPR 2025,
arXiv 2412.00081.

Of each task vector's matrix tau_t = U_t S_t V_t^T the k = floor(r / T) leading triplets are kept, r being the smaller
side and T the number of tasks. All tasks' vectors are put side by side and made orthogonal to each other::

    tau = polar([U_1 .. U_T]) diag(S_1 .. S_T) polar([V_1 .. V_T])^T,   shared = base + scaling * tau

where polar(P D Q^T) = P Q^T. The paper's alpha is ``scaling``. Tensors that are no matrices move
by ``scaling`` times the mean task vector.

Departures from the authors' code: k is at least 1, so a matrix with fewer rows than there are tasks is kept; no matrix
is left out by its name.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.merging.spectral import matrixwise, polar, triplets


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    scaling: float,
    basis: Callable[[Tensor], Tensor],
) -> Merged:
    """Keep each task's leading singular vectors, and make those of all tasks orthogonal.

    Args:
        basis: `twinbench.merging.compress.basis`, or something that remembers what it gave.

    Raises:
        ValueError: scaling is not finite.
    """
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")

    def solve(vectors: list[Tensor]) -> Tensor:
        kept = max(1, min(vectors[0].shape) // len(vectors))
        found = [triplets(vector, kept, basis) for vector in vectors]
        left = polar(torch.cat([each.left for each in found], dim=1))
        right = polar(torch.cat([each.right for each in found]))
        return left * torch.cat([each.values for each in found]) @ right

    return Merged(matrixwise(base, experts, solve, scaling))
