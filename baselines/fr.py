"""FR-Merging: "FREE-Merging: Fourier Transform for Efficient Model Merging", Zheng and Wang, ICCV 2025,
arXiv 2411.16815.

Task vectors interfere in the lowest frequencies of their matrices, so these are filtered out before they are added::

    shared = base + scaling * sum_t F^-1(H * F(tau_t))

F is the two-dimensional discrete Fourier transform. H is 0 at the bins that are farther than ``radius`` times the
larger side from the centre of the unshifted spectrum: at its corners, where the lowest frequencies are. Tensors that
are no matrices are not filtered. FREE-Merging (`baselines.free`) adds experts to it.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict


def merge(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, radius: float, scaling: float
) -> Merged:
    """Add the filtered task vectors.

    Args:
        radius: of the frequencies that stay, as a share of a matrix's larger side, above 0.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be above 0, got {radius}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")

    def merged(name: str) -> Tensor:
        origin = base[name]
        if not origin.is_floating_point():
            return origin
        total = sum(expert[name].float() - origin.float() for expert in experts.values())  # the filter is linear
        return (origin.float() + scaling * filtered(total, radius)).to(origin.dtype).contiguous()

    return Merged(StateDict(base, merged))


def filtered(matrix: Tensor, radius: float) -> Tensor:
    """A matrix without its lowest frequencies; anything else as it is."""
    if matrix.dim() != 2:
        return matrix
    rows, columns = (torch.arange(size) - size // 2 for size in matrix.shape)
    far = (rows[:, None].square() + columns.square()).sqrt() > radius * max(matrix.shape)
    return torch.fft.ifft2(torch.fft.fft2(matrix).masked_fill(far.to(matrix.device), 0)).real
