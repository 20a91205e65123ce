"""TIES-Merging: "Resolving Interference When Merging Models", Yadav et al., NeurIPS 2023, arXiv 2306.01708.

Trim: keep the ``density`` fraction of each task vector that is largest in magnitude (the paper's top-k %); the rest is
0. Elect: per weight the sign of the sum of the trimmed task vectors. Merge: ``shared = base + scaling * m``, where m is
the mean (or sum) of the trimmed values that have the elected sign.

Dialects that go by the same name elsewhere are parameters: ``scope`` trims over the whole model (the authors' code,
FusionBench) or over each tensor (mergekit); ``aggregate`` is the paper's disjoint mean, or the sum.

Departure: where the sum is 0 nothing is merged; the authors' code takes the sign that most of the vector has.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import PIECE, Combine, by_pieces, concurrently

SAMPLE = 1 << 18  # magnitudes from which the threshold is guessed
BRACKETS = (5.0, 50.0, math.inf)  # standard errors around the guess, one after the other until the threshold is inside


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
    return Merged(by_pieces(base, experts, combiner(base, experts, density, scaling, scope, aggregate)))


def combiner(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    density: float,
    scaling: float,
    scope: str,
    aggregate: str,
) -> Callable[[str], Combine]:
    """What `by_pieces` merges by, its arguments those of `merge`; a global threshold is found here, at once."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if scope not in ("global", "tensor"):
        raise ValueError(f"scope must be global or tensor, got {scope!r}")
    if aggregate not in ("mean", "sum"):
        raise ValueError(f"aggregate must be mean or sum, got {aggregate!r}")

    thresholds = {}
    if scope == "global":
        found = concurrently(lambda expert: kept_above(expert, density, base), experts.values())
        thresholds = dict(zip(experts, found, strict=True))

    def combine(name: str) -> Combine:
        if scope == "tensor":
            origin = {name: base[name]}
            limits = [kept_above({name: expert[name]}, density, origin) for expert in experts.values()]
        else:
            limits = [thresholds[task] for task in experts]
        below = [_before(limit) for limit in limits]
        return lambda origin, pieces: torch.add(origin, _elected(origin, pieces, below, aggregate), alpha=scaling)

    return combine


def _elected(origin: Tensor, pieces: list[Tensor], below: list[float], aggregate: str) -> Tensor:
    """The merged task vector m of a piece, from the experts' pieces and the largest magnitudes that they lose."""
    trimmed = [hardshrink(piece - origin, limit) for piece, limit in zip(pieces, below, strict=True)]
    sign = torch.zeros_like(origin)
    for vector in trimmed:
        sign += vector
    sign.sign_()
    total, count = torch.zeros_like(origin), torch.zeros_like(origin)
    for vector in trimmed:
        agreeing = vector.mul_(sign).clamp_(min=0)  # its magnitude where its sign is the elected one
        total += agreeing
        if aggregate == "mean":
            count += agreeing.sign_()
    total *= sign
    return total / count.clamp_(min=1) if aggregate == "mean" else total


def kept_above(vector: Mapping[str, Tensor], density: float, origin: Mapping[str, Tensor] | None = None) -> float:
    """The magnitude of the k-th largest element over all tensors, k = density * number of elements: exact, streaming.

    A sample says between which two magnitudes it lies; one pass counts the elements above them and collects the few
    between them, of which the k-th is then picked. Should the sample mislead, a wider bracket is tried.

    Args:
        vector: tensors of a task vector, or of an expert if ``origin`` gives the base to subtract.
    """
    like = vector if origin is None else origin
    sizes = {name: tensor.numel() for name, tensor in like.items() if tensor.is_floating_point()}
    names, total = list(sizes), sum(sizes.values())
    if not total:
        return 0.0
    k, sample = max(1, round(density * total)), _sample(vector, origin, names, total)
    for deviations in BRACKETS:
        low, high = _bracket(sample, k / total, deviations)
        above, between = 0, []
        for magnitudes in _magnitudes(vector, origin, names):
            values = magnitudes.cpu().numpy()  # whose comparisons and masks are several times faster than torch's
            over, within = values > high, values > low
            above += int(np.count_nonzero(over))
            between.append(values[within != over])
        between = torch.from_numpy(np.concatenate(between))
        if above < k <= above + len(between):
            return float(between.kthvalue(len(between) - (k - above) + 1).values)
        if low == 0 and k > above:
            break
    return 0.0  # fewer than k elements are not zero


def _magnitudes(
    vector: Mapping[str, Tensor], origin: Mapping[str, Tensor] | None, names: list[str]
) -> Iterator[Tensor]:
    """Absolute values of a task vector, a flat float32 piece after the other."""
    for name in names:
        pieces = vector[name].flatten().split(PIECE)
        if origin is None:
            yield from (piece.float().abs() for piece in pieces)
        else:
            for piece, first in zip(pieces, origin[name].flatten().split(PIECE), strict=True):
                yield (piece.float() - first.float()).abs_()


def _sample(vector: Mapping[str, Tensor], origin: Mapping[str, Tensor] | None, names: list[str], total: int) -> Tensor:
    """About SAMPLE magnitudes, evenly spaced over all tensors, in rising order."""
    stride, seen, found = math.ceil(total / SAMPLE) | 1, 0, []  # odd: not always the same few columns
    for name in names:
        tensor = vector[name].flatten()
        places = slice(-seen % stride, None, stride)
        seen += tensor.numel()
        found.append(tensor[places].float() - (0 if origin is None else origin[name].flatten()[places].float()))
    return torch.cat(found).abs_().sort().values


def _bracket(sample: Tensor, density: float, deviations: float) -> tuple[float, float]:
    """Magnitudes (low, high] around the one that ``density`` of all elements reach, by the sample's standard error."""
    size = len(sample)
    if deviations == math.inf or size < 2:
        return 0.0, math.inf
    margin = deviations * math.sqrt(size * density * (1 - density)) + 2
    low, high = math.floor(size * (1 - density) - margin), math.ceil(size * (1 - density) + margin)
    least = _before(float(sample[low])) if low >= 0 else 0.0
    return max(0.0, least), float(sample[high]) if high < size else math.inf


def _before(magnitude: float) -> float:
    """The float32 just below."""
    return float(torch.nextafter(torch.tensor(magnitude), torch.tensor(-math.inf)))
