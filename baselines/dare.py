"""DARE on Task Arithmetic: "Language Models are Super Mario", Yu et al., ICML 2024, arXiv 2311.03099.

Each element of a task vector is dropped with probability p = 1 - density, and what is left is rescaled by 1/density:
``shared = base + scaling * sum_t m_t * (expert_t - base) / density`` with m_t ~ Bernoulli(density).

Departure from the authors' code: vectors (biases, LayerNorm) are dropped as matrices are, as the paper says.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.compress import generator
from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import PIECE, Combine, StateDict, by_pieces


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    density: float,
    scaling: float,
    seed: int,
) -> Merged:
    """Drop, rescale, and merge by Task Arithmetic, in one pass.

    Args:
        density: fraction of weights kept, in (0, 1]; 1 drops nothing.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")

    def moved(name: str) -> Combine:
        draws = [generator(seed, task, name) for task in experts]

        def combine(origin: Tensor, pieces: list[Tensor]) -> Tensor:
            total = torch.zeros_like(origin)
            for piece, draw in zip(pieces, draws, strict=True):
                total += thinned(piece - origin, density, draw)
            return torch.add(origin, total, alpha=scaling)

        return combine

    return Merged(by_pieces(base, experts, moved))


def drop_and_rescale(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], density: float, seed: int
) -> dict[str, StateDict]:
    """Experts in float32 whose task vectors are thinned to ``density`` and rescaled by its inverse.

    Nothing is asked of tensors that are not floating point.
    """

    def expert(task: str, name: str) -> Tensor:
        origin = base[name]
        draw, result = generator(seed, task, name), torch.empty_like(origin, dtype=torch.float32)
        flat = (result.view(-1), origin.flatten(), experts[task][name].flatten())
        for target, first, piece in zip(*(tensor.split(PIECE) for tensor in flat), strict=True):
            first = first.float()
            torch.add(first, thinned(piece.float() - first, density, draw), out=target)
        return result

    return {task: StateDict(base, lambda name, task=task: expert(task, name)) for task in experts}


def thinned(vector: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Drop elements of a piece of a task vector, in place, and rescale the rest; ``draw`` goes on where it stood."""
    kept = torch.rand(vector.numel(), generator=draw).lt_(density)  # 1 or 0, in float32
    return vector.div_(density).mul_(kept.to(vector.device))
