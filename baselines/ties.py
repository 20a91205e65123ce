"""TIES-Merging: "Resolving Interference When Merging Models", Yadav et al., NeurIPS 2023, arXiv 2306.01708.

Trim: keep the ``density`` fraction of each task vector that is largest in magnitude (the paper's top-k %); the rest is
0. Elect: per weight the sign of the sum of the trimmed task vectors. Merge: ``shared = base + scaling * m``, where m is
the mean (or sum) of the trimmed values that have the elected sign.

Dialects that go by the same name elsewhere are parameters: ``scope`` trims over the whole model (the authors' code,
FusionBench) or over each tensor (mergekit); ``aggregate`` is the paper's disjoint mean, or the sum.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merged import Merged
from twinbench.state_dict import StateDict

BINS = 1 << 16  # the upper half of a float32's bits: sign (0), exponent and 7 bits of mantissa


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    density: float,
    scaling: float,
    scope: str,
    aggregate: str,
) -> Merged:
    """Trim, elect signs and merge.

    Args:
        density: fraction of weights kept, in (0, 1].
        scope: "global" or "tensor".
        aggregate: "mean" or "sum".

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if scope not in ("global", "tensor"):
        raise ValueError(f"scope must be global or tensor, got {scope!r}")
    if aggregate not in ("mean", "sum"):
        raise ValueError(f"aggregate must be mean or sum, got {aggregate!r}")

    def task_vector(task: str, name: str) -> Tensor:
        return experts[task][name].float() - base[name].float()

    thresholds = {}
    if scope == "global":
        for task in experts:
            vector = StateDict(base, lambda name, task=task: task_vector(task, name))
            thresholds[task] = kept_above(vector, density)

    def trimmed(task: str, name: str) -> Tensor:
        vector = task_vector(task, name)
        threshold = thresholds[task] if scope == "global" else kept_above({name: vector}, density)
        return vector * (vector.abs() >= threshold)

    def merged(name: str) -> Tensor:
        vectors = torch.stack([trimmed(task, name) for task in experts])
        elected = vectors.sum(0).sign()
        agreeing = vectors * (vectors.sign() == elected)
        total = agreeing.sum(0)
        if aggregate == "mean":
            total = total / (agreeing != 0).sum(0).clamp(min=1)
        return (base[name].float() + scaling * total).to(base[name].dtype)

    return Merged(StateDict(base, merged))


def kept_above(vector: Mapping[str, Tensor], density: float) -> float:
    """The magnitude of the k-th largest element over all tensors, k = density * number of elements: exact, streaming.

    The bits of a non-negative float32 order as integers, so one pass counts the upper 16 bits and a second one sorts
    only the elements whose upper bits are those of the k-th.
    """
    counts = torch.zeros(BINS, dtype=torch.int64)
    for tensor in vector.values():
        counts += torch.bincount(_upper_bits(tensor), minlength=BINS)
    if not counts.any():
        return 0.0
    k = max(1, round(density * int(counts.sum())))
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    chosen, above = BINS - 1 - position, int(from_top[position - 1]) if position else 0
    tied = torch.cat([tensor.flatten().abs()[_upper_bits(tensor) == chosen] for tensor in vector.values()])
    return float(tied.kthvalue(len(tied) - (k - above) + 1).values)


def _upper_bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().abs().view(torch.int32) >> 16
