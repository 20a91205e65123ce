"""Task Arithmetic: "Editing Models with Task Arithmetic", Ilharco et al., ICLR 2023, arXiv 2212.04089.

``shared = base + scaling * sum_t (expert_t - base)``. One scaling (lambda) serves all tasks.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import by_pieces


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, scaling: float) -> Merged:
    """Add the scaled sum of the task vectors, accumulating in float32.

    Raises:
        ValueError: scaling is not finite.
    """
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")

    def moved(origin: Tensor, pieces: list[Tensor]) -> Tensor:
        total, difference = torch.zeros_like(origin), torch.empty_like(origin)
        for piece in pieces:
            total += torch.sub(piece, origin, out=difference)
        return torch.add(origin, total, alpha=scaling)

    return Merged(by_pieces(base, experts, lambda name: moved))
