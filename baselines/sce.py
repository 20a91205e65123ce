"""SCE: "FuseChat: Knowledge Fusion of Chat Models", Wan et al., 2024, arXiv 2408.07990.

Per tensor: *select* the ``density`` share of weights in which the task vectors vary most; *calculate* a weight for
each expert, ``c_t = ||tau_t||^2 / sum_u ||tau_u||^2`` of what was selected; *erase* per weight the task vectors whose
sign is not that of their sum: ``shared = base + sum_t c_t e_t tau_t / sum_t c_t e_t`` with e_t in {0, 1}.

Departure from mergekit: it weighs all experts alike where the mean squares of the task vectors sum to less than 1e-6.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, density: float) -> Merged:
    """Select, calculate, erase.

    Args:
        density: share selected of the weights that vary, in (0, 1]; 1 selects all.

    Raises:
        ValueError: density is out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")

    def merged(name: str) -> Tensor:
        origin = base[name]
        if not origin.is_floating_point():
            return origin
        first = origin.flatten().float()
        vectors = torch.stack([expert[name].flatten().float() - first for expert in experts.values()])
        if density < 1:
            vectors = vectors * _varying(vectors, density)
        sizes = vectors.square().sum(1, keepdim=True)
        agrees = vectors.sign() == torch.where(vectors.sum(0) < 0, -1.0, 1.0)
        weights = torch.where(agrees, sizes / sizes.sum().clamp(min=torch.finfo(sizes.dtype).tiny), 0.0)
        moved = (weights * vectors).sum(0) / weights.sum(0).clamp(min=1e-6)
        return (first + moved).view(origin.shape).to(origin.dtype)

    return Merged(StateDict(base, merged))


def _varying(vectors: Tensor, density: float) -> Tensor:
    """A mask (n,) of the weights whose task vectors (T, n) vary most."""
    spread = vectors.var(0, correction=0)
    chosen = spread.topk(int(density * int((spread > 0).sum()))).indices
    return torch.zeros_like(spread).index_fill_(0, chosen, 1.0)
