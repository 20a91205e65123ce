"""Model Stock: "Model Stock: All we need is just a few fine-tuned models", Jang et al., ECCV 2024, arXiv 2403.19522.

Fine-tuned models lie on a shell around a better one, and their angles tell how far. Per tensor, with c the mean cosine
of two task vectors and T experts::

    t = T c / (1 + (T - 1) c),   shared = t mean_t(expert_t) + (1 - t) base

Experts of one task are what it was made for. Departures: t is clamped to [0, 1], since task vectors that point apart
(c < 0) would push away from the experts; a zero task vector has cosine 0. FusionBench averages angles, not cosines.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> Merged:
    """Pull the average of each tensor towards the base, as far as the experts' angles say.

    Raises:
        ValueError: there are fewer than two experts, so no angle.
    """
    if len(experts) < 2:
        raise ValueError(f"Model Stock needs at least 2 experts, got {len(experts)}")

    def merged(name: str) -> Tensor:
        origin = base[name]
        if not origin.is_floating_point():
            return origin
        vectors = torch.stack(
            [expert[name].flatten().float() - origin.flatten().float() for expert in experts.values()]
        )
        mean = vectors.mean(0)
        moved = (_ratio(vectors) * mean).view(origin.shape)
        return (origin.float() + moved).to(origin.dtype)

    return Merged(StateDict(base, merged))


def _ratio(vectors: Tensor) -> float:
    """t of task vectors (T, n): their mean cosine comes from the length of the sum of unit vectors."""
    count = len(vectors)
    lengths = vectors.norm(dim=1, keepdim=True)
    units = torch.where(lengths > 0, vectors / lengths, 0.0)
    same = float((lengths > 0).sum())
    cosine = (float(units.sum(0).double().square().sum()) - same) / (count * (count - 1))
    turned = 1 + (count - 1) * cosine
    return min(max(count * cosine / turned, 0.0), 1.0) if turned > 0 else 0.0
