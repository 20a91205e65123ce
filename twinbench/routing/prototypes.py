"""One vector per expert: ``w = softmax(cos(x - m, p_e - m) / T)``, the nearest class mean with a temperature.

p_e is the mean of an expert's training rows, and m the mean of all p_e, which is what every text has in common. T is
fitted on held-out rows by cross-entropy ("On Calibration of Modern Neural Networks", Guo et al., 2017,
arXiv 1706.04599), every expert's rows counting the same.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinbench.routing.recipe import checked

DRAWS = {}
RANGE = (1e-3, 1e3)  # of a fitted temperature: cosines 0.1 apart are e^100 to 1 at its lower end, alike at its upper


@dataclass(frozen=True)
class Prototypes:
    """How sharp the weights are.

    Args:
        temperature: T; None fits it.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float | None

    def __post_init__(self):
        legal = self.temperature is None or self.temperature > 0
        checked("model", self, temperature=(legal, "null or above 0"))

    def fit(self, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], seed: int | None) -> "Means":
        """Take the means, and find the temperature.

        Args:
            train: features (n, width) and expert positions (n,), at least one row of each expert.
            held_out: the same of rows that no expert was trained on.
        """
        means = Means(*train)
        means.temperature.fill_(self.temperature or _temperature(means.cosines(held_out[0]), held_out[1]))
        return means


class Means(nn.Module):
    """(n, width) features to (n, experts) logits.

    Attributes:
        mean: of the experts' means, (width,).
        prototypes: the experts' means without it, of unit length, (experts, width).
        temperature: what the cosines are divided by, ().
    """

    def __init__(self, features: Tensor, experts: Tensor):
        super().__init__()
        own = torch.stack([features[experts == expert].mean(0) for expert in range(int(experts.max()) + 1)])
        self.register_buffer("mean", own.mean(0))
        self.register_buffer("prototypes", F.normalize(own - self.mean))
        self.register_buffer("temperature", features.new_ones(()))

    def cosines(self, features: Tensor) -> Tensor:
        return F.normalize(features - self.mean) @ self.prototypes.T

    def logits(self, features: Tensor) -> Tensor:
        return self.cosines(features) / self.temperature


def _temperature(cosines: Tensor, experts: Tensor) -> float:
    """The temperature of the least cross-entropy; in 1 / T it is convex, so there is one minimum."""
    from scipy.optimize import minimize_scalar  # half a second that few runs need to pay

    cosines, experts = cosines.double().cpu(), experts.cpu()
    weight = 1 / torch.bincount(experts, minlength=cosines.shape[1]).clamp(min=1).double()

    def loss(logarithm: float) -> float:
        return F.cross_entropy(cosines / math.exp(logarithm), experts, weight).item()

    return math.exp(minimize_scalar(loss, bounds=[math.log(end) for end in RANGE], method="bounded").x)
