"""MagMax: "MagMax: Leveraging Model Merging for Seamless Continual Learning", Marczak et al., ECCV 2024,
arXiv 2407.06322.

Per weight the task vector of the largest magnitude wins: ``shared = base + scaling * tau`` with tau = tau_t for t =
argmax_t |tau_t|. Of equal magnitudes the later task's is taken.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import by_pieces


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, scaling: float) -> Merged:
    """Add the largest of the task vectors' values.

    Raises:
        ValueError: scaling is not finite.
    """
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")

    def largest(origin: Tensor, pieces: list[Tensor]) -> Tensor:
        found = torch.zeros_like(origin)
        for piece in pieces:
            vector = piece - origin
            found = torch.where(vector.abs() >= found.abs(), vector, found)
        return torch.add(origin, found, alpha=scaling)

    return Merged(by_pieces(base, experts, lambda name: largest))
