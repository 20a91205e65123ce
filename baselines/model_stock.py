"""Model Stock: "Model Stock: All we need is just a few fine-tuned models", Jang et al., ECCV 2024, arXiv 2403.19522.

Fine-tuned models lie on a shell around a better one, and their angles tell how far. Per tensor, with c the mean cosine
of two task vectors and T experts::

    t = T c / (1 + (T - 1) c),   shared = t mean_t(expert_t) + (1 - t) base

Experts of one task are what it was made for. Departures: t is clamped to [0, 1], since task vectors that point apart
(c < 0) would push away from the experts; a zero task vector has cosine 0. FusionBench averages angles, not cosines.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import by_pieces, task_vectors


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> Merged:
    """Pull the average of each tensor towards the base, as far as the experts' angles say.

    Raises:
        ValueError: there are fewer than two experts, so no angle.
    """
    if len(experts) < 2:
        raise ValueError(f"Model Stock needs at least 2 experts, got {len(experts)}")

    def combine(name: str) -> Callable[[Tensor, list[Tensor]], Tensor]:
        found = task_vectors(base[name], [own[name] for own in experts.values()])
        share = _ratio(sum((vectors @ vectors.T).double() for vectors in found)) / len(experts)
        return lambda origin, pieces: torch.add(origin, sum(piece - origin for piece in pieces), alpha=share)

    return Merged(by_pieces(base, experts, combine))


def _ratio(products: Tensor) -> float:
    """t of task vectors with these inner products (T, T): it goes by their mean cosine."""
    count, lengths = len(products), products.diagonal().sqrt()
    cosines = products / torch.outer(lengths, lengths).clamp(min=1e-300)
    cosine = float(cosines.sum() - cosines.trace()) / (count * (count - 1))
    turned = 1 + (count - 1) * cosine
    return min(max(count * cosine / turned, 0.0), 1.0) if turned > 0 else 0.0
