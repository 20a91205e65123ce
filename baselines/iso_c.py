"""Iso-C: "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", Marczak et al.,
ICML 2025, arXiv 2502.04959.

The sum of the task vectors' matrices, ``sum_t tau_t = U S V^T``, gets one singular value for all of them, the mean s of
S: ``shared = base + scaling * s U V^T``. The paper's alpha is ``scaling``. Tensors that are no matrices move by
``scaling`` times the mean task vector.

Departures from the authors' code: no matrix is left out by its name; directions that the sum has not got stay zero,
where the code takes arbitrary ones. A copy of the code elsewhere flattens the mean in the place of the sum, so that its
alpha is T times as large.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.merging.spectral import matrixwise, triplets


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, scaling: float) -> Merged:
    """Give all singular values of each summed matrix their mean.

    Raises:
        ValueError: scaling is not finite.
    """
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")

    def solve(vectors: list[Tensor]) -> Tensor:
        found = triplets(sum(vectors))
        return float(found.values.sum()) / min(vectors[0].shape) * (found.left @ found.right)

    return Merged(matrixwise(base, experts, solve, scaling))
