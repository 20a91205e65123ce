"""Localize-and-Stitch, dataless: "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic", He et al.,
TMLR 2025, arXiv 2408.13656.

*Localize*: of each task vector the ``density`` share of the largest magnitudes over all blocks. *Stitch*: average where
several tasks keep a weight, ``shared = base + sum_t m_t tau_t / max(1, sum_t m_t)``. Tensors outside of the blocks,
embeddings among them, stay the base's.

The authors' better variant trains the masks on labelled data; this one needs none. Departure: their script goes on from
the model that the last task was stitched into, and finds later task vectors beside that; here all are the experts' own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from baselines.ties import kept_above
from twinbench.merging.blocks import block
from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict, by_pieces


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, density: float) -> Merged:
    """Keep the largest values of each task vector and average where they meet.

    Args:
        density: share of the blocks' weights that each task keeps, in (0, 1].

    Raises:
        ValueError: density is out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    inside = [name for name in base if block(name) is not None]
    origin = StateDict(inside, lambda name: base[name])
    limits = [
        kept_above(StateDict(inside, lambda name, own=own: own[name]), density, origin) for own in experts.values()
    ]

    def stitched(first: Tensor, pieces: list[Tensor]) -> Tensor:
        total, count = torch.zeros_like(first), torch.zeros_like(first)
        for piece, limit in zip(pieces, limits, strict=True):
            vector = piece - first
            kept = (vector.abs() >= limit) & (vector != 0)
            total += vector * kept
            count += kept
        return first + total / count.clamp(min=1)

    moved = by_pieces(origin, experts, lambda name: stitched)
    return Merged(StateDict(base, lambda name: moved[name] if name in moved else base[name]))
