"""PCB-Merging: "Parameter Competition Balancing for Model Merging", Du et al., NeurIPS 2024, arXiv 2410.02396.

Every weight of every task competes, over the whole model. With |tau_t| clipped to its ``clip`` and 1 - ``clip``
quantiles, its sign kept, N scaling values to [0, 1] from the smallest to the largest, and T tasks::

    intra_t = exp(T N(|tau_t|)^2),   inter_t = tanh(tau_t sum_u tau_u),   beta_t = intra_t inter_t
    s_t = N(max(beta_t, its (1 - density) quantile)),   shared = base + scaling * sum_t s_t tau_t / sum_t s_t

``inter: signs`` is the authors' vision code, ``inter_t = tanh(tau_t sum_u sgn(tau_u) N(|tau_u|))``. The paper's r is
``density``, its lambda ``scaling``.

Departures: inter_t is of the clipped task vectors, where the code takes the raw ones. Quantiles are order statistics,
without interpolation. A beta of 0 or less is never kept, also where fewer than the ``density`` share are above it.
Beside a few tensors one model is in memory, in float32.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

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
    names = [name for name in base if base[name].is_floating_point() and base[name].numel()]
    if not names:
        return Merged(base)
    ends = [(kept_above(own, 1 - clip, base), kept_above(own, clip, base)) for own in experts.values()]

    def clipped(origin: Tensor, pieces: list[Tensor]) -> Iterator[Clipped]:
        return (_clipped(piece.float() - origin.float(), *end) for piece, end in zip(pieces, ends, strict=True))

    # One model in memory, so that no task's betas need the other tasks' weights.
    against = {name: _sum(clipped(base[name], [own[name] for own in experts.values()]), inter) for name in names}
    bounds = []
    for own, end in zip(experts.values(), ends, strict=True):

        def beta(name: str, own=own, end=end) -> Tensor:
            vector = _clipped(own[name].float() - base[name].float(), *end)
            return _beta(vector, against[name], len(experts)).clamp_(min=0)

        betas = StateDict(names, beta)
        bounds.append((kept_above(betas, density), max(float(betas[name].max()) for name in names)))
    against.clear()

    def combine(origin: Tensor, pieces: list[Tensor]) -> Tensor:
        vectors = list(clipped(origin, pieces))
        of_all, total, weights = _sum(vectors, inter), torch.zeros_like(origin), torch.zeros_like(origin)
        for vector, (least, most) in zip(vectors, bounds, strict=True):
            weight = (_beta(vector, of_all, len(vectors)).clamp_(min=least) - least) / ((most - least) or 1.0)
            total += weight * vector.values
            weights += weight
        return torch.add(origin, total / weights.clamp(min=1e-12), alpha=scaling)

    return Merged(by_pieces(base, experts, lambda name: combine))


class Clipped(NamedTuple):
    """A task vector with clipped magnitudes, and ``N(|tau_t|)`` of these."""

    values: Tensor
    shares: Tensor


def _clipped(vector: Tensor, least: float, most: float) -> Clipped:
    size = vector.abs().clamp_(least, most)
    return Clipped(vector.sign() * size, (size - least) / ((most - least) or 1.0))


def _sum(vectors: Iterable[Clipped], inter: str) -> Tensor:
    """What each task's weight is compared with: the sum of all tasks', or of their signs by their shares."""
    return sum(each.values if inter == "sum" else each.values.sign() * each.shares for each in vectors)


def _beta(vector: Clipped, against: Tensor, tasks: int) -> Tensor:
    """``intra_t inter_t`` of one task."""
    return (tasks * vector.shares.square()).exp_() * (vector.values * against).tanh_()
