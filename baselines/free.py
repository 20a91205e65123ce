"""FREE-Merging: "FREE-Merging: Fourier Transform for Efficient Model Merging", Zheng and Wang, ICCV 2025,
arXiv 2411.16815.

Task vectors interfere in the lowest frequencies of their matrices. *Filter* them out and add the rest; beside that a
light *expert* per task holds the largest values of each row, and a router weighs the experts::

    shared = base + scaling * sum_t F^-1(H * F(tau_t)),   exclusive_t = rescale * top_density(tau_t)

F is the two-dimensional discrete Fourier transform, and H is 0 at the bins that are farther than ``radius`` times the
larger side from the centre of the unshifted spectrum: at its corners, the lowest frequencies. Vectors are not filtered.

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
    radius: float,
    scaling: float,
    density: float,
    rescale: float,
) -> Merged:
    """Merge the filtered task vectors, and keep each task's largest values for a router to weigh.

    Args:
        radius: of the frequencies that stay, as a share of a matrix's larger side, above 0.
        density: share of each row that an expert keeps, in (0, 1]; at least one value.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be above 0, got {radius}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    for name, value in (("scaling", scaling), ("rescale", rescale)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")

    def vector(task: str, name: str) -> Tensor:
        return experts[task][name].float() - base[name].float()

    def shared(name: str) -> Tensor:
        origin = base[name]
        if not origin.is_floating_point():
            return origin
        total = sum(vector(task, name) for task in experts)  # the filter is linear
        return (origin.float() + scaling * filtered(total, radius)).to(origin.dtype).contiguous()

    names = [name for name in base if base[name].is_floating_point()]
    parts = {
        task: StateDict(names, lambda name, task=task: largest(vector(task, name), density, rescale))
        for task in experts
    }
    return Merged(StateDict(base, shared), parts)


def filtered(matrix: Tensor, radius: float) -> Tensor:
    """A matrix without its lowest frequencies; anything else as it is."""
    if matrix.dim() != 2:
        return matrix
    rows, columns = (torch.arange(size) - size // 2 for size in matrix.shape)
    far = (rows[:, None].square() + columns.square()).sqrt() > radius * max(matrix.shape)
    return torch.fft.ifft2(torch.fft.fft2(matrix).masked_fill(far.to(matrix.device), 0)).real


def largest(vector: Tensor, density: float, rescale: float) -> Sparse:
    """The largest magnitudes of each row, times a number; a vector is one row."""
    rows = vector.reshape(-1, vector.shape[-1]) if vector.dim() else vector.view(1, 1)
    order = rows.abs().topk(max(1, round(density * rows.shape[1])), dim=1).indices
    kept = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).flatten()
    return Sparse(rescale * vector.flatten()[kept], packed(kept), tuple(vector.shape))
