"""CART, centred arithmetic with rank-reduced task vectors: "Revisiting Weight Averaging for Model Merging", Choi et
al., 2024, arXiv 2412.12153.

Task vectors are taken from the average of the experts and not from the base, and only their leading triplets are
added: ``shared = mean + scaling * sum_t SVD_k(expert_t - mean)`` for every linear layer's weight, with k =
``rank_ratio`` of its smaller side. All other tensors, embeddings among them, are averaged: there the sum of the centred
vectors is 0. The paper's lambda is ``scaling``.
"""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from baselines import average
from baselines.smile import is_linear
from twinbench.merging.compress import svd
from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    rank_ratio: float,
    scaling: float,
    basis: Callable[[Tensor], Tensor],
) -> Merged:
    """Average, and add what each expert differs from the average by, at low rank.

    Args:
        rank_ratio: share of singular triplets kept, in (0, 1]; at least one is.
        basis: `twinbench.merging.compress.basis`, or something that remembers what it gave.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if not 0 < rank_ratio <= 1:
        raise ValueError(f"rank_ratio must be in (0, 1], got {rank_ratio}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    averaged = average.merge(base, experts).shared

    def merged(name: str) -> Tensor:
        mean = averaged[name]
        if not is_linear(name, mean):
            return mean
        rank = max(1, int(rank_ratio * min(mean.shape)))
        exact = sum(expert[name].float() for expert in experts.values()) / len(experts)
        low = sum(svd(expert[name].float() - exact, rank, basis).dense() for expert in experts.values())
        return (exact + scaling * low).to(mean.dtype).contiguous()

    return Merged(StateDict(base, merged))
