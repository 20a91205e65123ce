"""Consensus Task Arithmetic: "Localizing Task Information for Improved Model Merging and Compression", Wang et al.,
ICML 2024, arXiv 2405.07813.

With tau = sum_t tau_t, the TALL-mask of a task is ``m_t = 1{|tau_t| > threshold |tau - tau_t|}``
(`baselines.tall_masks` keeps them). Weights that fewer than ``agreeing`` masks keep serve nobody, or one task at the
others' cost, and go back to the base: ``shared = base + scaling * c tau`` with ``c = 1{sum_t m_t >= agreeing}``. The
paper's lambda is ``threshold``, its k ``agreeing``, its alpha ``scaling``.

Departure: the authors choose lambda for each task by its score on validation data; one threshold serves all here.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import by_pieces


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    threshold: float,
    agreeing: int,
    scaling: float,
) -> Merged:
    """Add the task vectors where enough tasks need their sum.

    Args:
        threshold: a task's own weight is kept if it exceeds this share of the other tasks' sum; at least 0.
        agreeing: how many masks have to keep a weight; 0 is Task Arithmetic.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if not 0 <= agreeing <= len(experts):
        raise ValueError(f"agreeing must be in [0, {len(experts)}], the number of experts; got {agreeing}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")

    def moved(origin: Tensor, pieces: list[Tensor]) -> Tensor:
        vectors = [piece - origin for piece in pieces]
        total = sum(vectors, torch.zeros_like(origin))
        votes = torch.zeros_like(origin)
        for own in vectors:
            others = total - own if len(vectors) > 1 else 0 * own  # exactly, not up to rounding
            votes += own.abs() > threshold * others.abs()
        return torch.add(origin, total * (votes >= agreeing), alpha=scaling)

    return Merged(by_pieces(base, experts, lambda name: moved))
