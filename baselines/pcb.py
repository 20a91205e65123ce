"""PCB-Merging: "Parameter Competition Balancing for Model Merging", Du et al., NeurIPS 2024, arXiv 2410.02396.

Every weight of every task competes, over the whole model. With |tau_t| clipped to its ``clip`` and 1 - ``clip``
quantiles, its sign kept, N scaling values to [0, 1] from the smallest to the largest, and T tasks::

    intra_t = exp(T N(|tau_t|)^2),   inter_t = tanh(tau_t sum_u tau_u),   beta_t = intra_t inter_t
    s_t = N(max(beta_t, its (1 - density) quantile)),   shared = base + scaling * sum_t s_t tau_t / sum_t s_t

``inter: signs`` is the authors' vision code, ``inter_t = tanh(tau_t sum_u sgn(tau_u) N(|tau_u|))``. The paper's r is
``density``, its lambda ``scaling``.

Departures: inter_t is of the clipped task vectors, where the code takes the raw ones. Quantiles are order statistics,
without interpolation. A beta of 0 or less is never kept, also where fewer than the ``density`` share are above it.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from baselines.ties import kept_above
from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict, by_pieces


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    density: float,
    clip: float,
    inter: str,
    scaling: float,
) -> Merged:
    """Weigh every task's weight by how it competes with the others, and average.

    Args:
        density: share of each task's weights that is kept, in (0, 1].
        clip: share of each task's magnitudes that is clipped at either end, in (0, 0.5).
        inter: "sum" or "signs": what a task's weight is compared with.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if not 0 < clip < 0.5:
        raise ValueError(f"clip must be in (0, 0.5), got {clip}")
    if inter not in ("sum", "signs"):
        raise ValueError(f"inter must be sum or signs, got {inter!r}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    names = [name for name in base if base[name].is_floating_point()]
    if not names:
        return Merged(base)
    ends = {task: (kept_above(own, 1 - clip, base), kept_above(own, clip, base)) for task, own in experts.items()}
    balance = _balance(list(ends.values()), inter)
    bounds = [_bounds(base, experts, names, balance, position, density) for position in range(len(experts))]

    def combine(origin: Tensor, pieces: list[Tensor]) -> Tensor:
        vectors, beta = balance(origin, pieces)
        total, weights = torch.zeros_like(origin), torch.zeros_like(origin)
        for position, (vector, (least, most)) in enumerate(zip(vectors, bounds, strict=True)):
            weight = (beta(position).clamp(min=least) - least) / ((most - least) or 1.0)
            total += weight * vector
            weights += weight
        return torch.add(origin, total / weights.clamp(min=1e-12), alpha=scaling)

    return Merged(by_pieces(base, experts, lambda name: combine))


Balance = Callable[[Tensor, list[Tensor]], tuple[list[Tensor], Callable[[int], Tensor]]]


def _balance(ends: list[tuple[float, float]], inter: str) -> Balance:
    """From a piece of the base and of the experts the clipped task vectors, and by position an expert's betas."""

    def balanced(origin: Tensor, pieces: list[Tensor]) -> tuple[list[Tensor], Callable[[int], Tensor]]:
        vectors, shares = [], []
        for piece, (least, most) in zip(pieces, ends, strict=True):
            vector = piece - origin
            size = vector.abs().clamp(least, most)
            vectors.append(vector.sign() * size)
            shares.append((size - least) / ((most - least) or 1.0))
        signed = vectors if inter == "sum" else [v.sign() * share for v, share in zip(vectors, shares, strict=True)]
        against = sum(signed)

        def beta(position: int) -> Tensor:
            return (len(vectors) * shares[position].square()).exp() * (vectors[position] * against).tanh()

        return vectors, beta

    return balanced


def _bounds(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    names: list[str],
    balance: Balance,
    position: int,
    density: float,
) -> tuple[float, float]:
    """Of one expert's betas the least that is kept, and the largest."""

    def beta(name: str) -> Tensor:
        _, found = balance(base[name].float(), [own[name].float() for own in experts.values()])
        return found(position).clamp(min=0)

    betas = StateDict(names, beta)
    return kept_above(betas, density), max(float(betas[name].max()) for name in names)
