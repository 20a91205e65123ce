"""DELLA: "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", Deep et al., 2024,
arXiv 2406.11617.

As DARE on TIES (`baselines.dare_ties`), but large values are more often kept. Of each row of a task vector the
magnitudes are ranked, from 0 for the smallest to 1 for the largest. A value of rank rho stays with probability
``q = density - window / 2 + window * rho`` and is divided by q. Then per weight the sign of the sum is elected, and
what has it is averaged (or summed): ``shared = base + scaling * m``. A vector is one row. The paper's drop rate p is
1 - ``density``, its epsilon half of ``window``, its lambda ``scaling``.

Departures from the authors' code: q outside of (0, 1] is refused, where the code prints a warning; a row of one value
has rank 1/2, where the code divides 0 by 0. mergekit rescales to the row's L1 norm in the place of 1 / q.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from baselines.ties import _elected
from twinbench.merging.compress import generator
from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict, by_pieces


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    density: float,
    window: float,
    scaling: float,
    aggregate: str,
    seed: int,
) -> Merged:
    """Drop by rank, rescale, elect signs and merge.

    Args:
        density: mean share of a row that is kept, in (0, 1].
        window: by how much the largest value's probability exceeds the smallest one's, at least 0.
        aggregate: "mean" or "sum" of the values with the elected sign.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if aggregate not in ("mean", "sum"):
        raise ValueError(f"aggregate must be mean or sum, got {aggregate!r}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if not (window >= 0 and window / 2 < density <= 1 - window / 2):
        raise ValueError(f"density ± window / 2 must be in (0, 1], got density={density}, window={window}")

    def thinned(task: str, name: str) -> Tensor:
        vector = experts[task][name].float() - base[name].float()
        if vector.dim() == 0:
            return experts[task][name].float()
        draw = torch.rand(vector.shape, generator=generator(seed, task, name)).to(vector.device)
        probability = density - window / 2 + window * ranks(vector)
        return base[name].float() + torch.where(draw < probability, vector / probability, 0.0)

    def moved(origin: Tensor, pieces: list[Tensor]) -> Tensor:
        return torch.add(origin, _elected(origin, pieces, [0.0] * len(pieces), aggregate), alpha=scaling)

    whole = {task: StateDict(base, lambda name, task=task: thinned(task, name)) for task in experts}
    return Merged(by_pieces(base, whole, lambda name: moved))


def ranks(vector: Tensor) -> Tensor:
    """Per row the rank of each magnitude, from 0 for the smallest to 1 for the largest; 1/2 for a row of one."""
    length = vector.shape[-1]
    if length == 1:
        return torch.full_like(vector, 0.5)
    places = vector.abs().argsort(dim=-1, stable=True)
    order = torch.arange(length, dtype=vector.dtype, device=vector.device).expand_as(vector).contiguous()
    return torch.empty_like(vector).scatter_(-1, places, order) / (length - 1)
