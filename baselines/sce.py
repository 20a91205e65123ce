"""SCE: "FuseChat: Knowledge Fusion of Chat Models", Wan et al., 2024, arXiv 2408.07990.

Per tensor: *select* the ``density`` share of weights in which the task vectors vary most; *calculate* a weight for
each expert, ``c_t = ||tau_t||^2 / sum_u ||tau_u||^2`` of what was selected; *erase* per weight the task vectors whose
sign is not that of their sum: ``shared = base + sum_t c_t e_t tau_t / sum_t c_t e_t`` with e_t in {0, 1}.

Departure from mergekit: it weighs all experts alike where the mean squares of the task vectors sum to less than 1e-6.
"""

from collections.abc import Callable, Mapping
from itertools import repeat

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import PIECE, by_pieces, task_vectors


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, density: float) -> Merged:
    """Select, calculate, erase.

    Args:
        density: share selected of the weights that vary, in (0, 1]; 1 selects all.

    Raises:
        ValueError: density is out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")

    def combine(name: str) -> Callable[[Tensor, list[Tensor]], Tensor]:
        origin, own = base[name], [expert[name] for expert in experts.values()]
        chosen = _varying(origin, own, density).split(PIECE) if density < 1 else repeat(torch.tensor(True))
        parts = zip(task_vectors(origin, own), chosen, strict=False)
        sizes = sum((vectors * mask).square().sum(1) for vectors, mask in parts)[:, None]
        sizes = sizes / sizes.sum().clamp(min=torch.finfo(sizes.dtype).tiny)
        masks = iter(chosen)

        def moved(first: Tensor, pieces: list[Tensor]) -> Tensor:
            vectors = (torch.stack(pieces) - first) * next(masks)
            agrees = vectors.sign() == torch.where(vectors.sum(0) < 0, -1.0, 1.0)
            weights = torch.where(agrees, sizes, 0.0)
            return first + (weights * vectors).sum(0) / weights.sum(0).clamp(min=1e-6)

        return moved

    return Merged(by_pieces(base, experts, combine))


def _varying(origin: Tensor, experts: list[Tensor], density: float) -> Tensor:
    """A mask (n,) of a tensor's weights whose task vectors vary most."""
    spread = torch.cat([vectors.var(0, correction=0) for vectors in task_vectors(origin, experts)])
    chosen = spread.topk(int(density * int((spread > 0).sum()))).indices
    return torch.zeros_like(spread, dtype=torch.bool).index_fill_(0, chosen, True)
