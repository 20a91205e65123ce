"""RegMean: "Dataless Knowledge Fusion by Merging Weights of Language Models", Jin et al., ICLR 2023, arXiv 2212.09849.

``W = (sum_t W_t G_t) (sum_t G_t)^-1`` for every linear layer (Eq. 2; our W is (d_out, d_in), the transpose of theirs):
of all matrices the one that minimizes ``sum_t ||X_t W^T - X_t W_t^T||^2``, where X_t are the layer's inputs when expert
t runs its own training rows, and G_t = X_t^T X_t / tokens. Off the diagonal each G_t is multiplied by the paper's
alpha, our ``scaling``. All other tensors are averaged. There are no exclusive parts.

Departures: each task counts the same whatever its number of tokens; padding is left out of G_t; a ridge pulls to the
average of the experts where no task has inputs, for a sum of G_t that has no inverse otherwise.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from baselines import average
from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    rows: int,
    scaling: float,
    ridge: float,
    gram: Callable[[str, int], Mapping[str, Tensor]],
) -> Merged:
    """Merge the weights of linear layers by regression, and average all other tensors.

    Args:
        rows: training rows of each expert's task that its layers' inputs are taken from.
        scaling: factor of the off-diagonal elements of each G_t, in [0, 1].
        ridge: added to the diagonal of the sum of G_t, as a share of that diagonal's mean; above 0. Ten times as much,
            and so on, where rounding leaves the sum without a Cholesky factor.
        gram: from an expert and the number of rows, G_t (d_in, d_in) by the name of the layer's weight (d_out, d_in).

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if not 0 <= scaling <= 1:
        raise ValueError(f"scaling must be in [0, 1], got {scaling}")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge must be above 0, got {ridge}")
    grams = {expert: gram(expert, rows) for expert in experts}
    averaged = average.merge(base, experts).shared

    def regressed(name: str) -> Tensor:
        mean = sum(state[name].double() for state in experts.values()) / len(experts)
        total, pulled = 0, 0
        for expert, state in experts.items():
            own = grams[expert][name].double()
            own = torch.lerp(own.diagonal().diag(), own, scaling)
            total, pulled = total + own, pulled + (state[name].double() - mean) @ own
        solved = torch.cholesky_solve(pulled.T, _factor(total, ridge * (float(total.diagonal().mean()) or 1.0))).T
        return (mean + solved).to(base[name].dtype).contiguous()

    known = {name for name in base if all(name in own for own in grams.values())}
    return Merged(StateDict(base, lambda name: regressed(name) if name in known else averaged[name]))


def _factor(total: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of ``total + ridge``; of the smallest ridge * 10^k with which rounding leaves it positive.

    Raises:
        ValueError: the matrix is not finite.
    """
    while ridge < float("inf"):
        found, failed = torch.linalg.cholesky_ex(total + ridge * torch.eye(len(total), dtype=total.dtype))
        if not failed:
            return found
        ridge *= 10
    raise ValueError("a sum of Gram matrices is not finite")
