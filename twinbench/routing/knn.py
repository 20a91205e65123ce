"""The router of T-Switch (arXiv 2412.00054, "Auto-Switch"): the experts of the nearest training rows.

``w_e = sum over the k nearest rows i of [e_i = e] / k``. Nothing is trained: the model is its training rows.

Near is what has a large cosine once the mean is taken away: hidden states of all texts share one large component, which
tells no task from another, and their length goes with that of a text. Standardized features would count characters
that hardly occur as much as all others.

Departures from the authors' code: a row has weights of its own, where the code averages them over a batch of one data
set. A row that is as near as the k-th one counts too, so that no order of rows matters.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinbench.routing.recipe import checked
from twinbench.system.mistakes import Mistake

DRAWS = {}
ABSENT = -200.0  # the logarithm of no share: finite, which groups of alike logits need, and its softmax is 0 in float32
CHUNK = 256  # rows that are compared with all training rows at once


@dataclass(frozen=True)
class Knn:
    """Whom to ask.

    Args:
        neighbours: k, of all training rows.
        balanced: weigh the training rows so that every expert's count the same, as every task does in an average.

    Raises:
        ValueError: a value is out of range.
    """

    neighbours: int
    balanced: bool

    def __post_init__(self):
        checked("model", self, neighbours=(self.neighbours >= 1, "at least 1"))

    def fit(self, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], seed: int | None) -> "Neighbours":
        """Keep the training rows; the held-out rows choose nothing.

        Args:
            train: features (n, width) and expert positions (n,).

        Raises:
            ValueError: there are fewer training rows than neighbours.
        """
        if self.neighbours > len(train[0]):
            raise Mistake(
                f"router.model.neighbours must be at most the {len(train[0])} training rows, got {self.neighbours}"
            )
        return Neighbours(*train, self)


class Neighbours(nn.Module):
    """(n, width) features to (n, experts) logits: the logarithms of the shares.

    Attributes:
        rows: training rows without their mean, of unit length, (training rows, width).
        experts: theirs, (training rows,).
        votes: one-hot at its expert, times what a row counts, (training rows, experts).
    """

    def __init__(self, features: Tensor, experts: Tensor, recipe: Knn):
        super().__init__()
        self.neighbours = recipe.neighbours
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("rows", F.normalize(features - self.mean))
        self.register_buffer("experts", experts)
        votes = F.one_hot(experts).to(features)
        votes = votes / votes.sum(0) if recipe.balanced else votes
        self.register_buffer("votes", votes, persistent=False)  # follows from the experts, so nobody writes it

    def logits(self, features: Tensor) -> Tensor:
        return torch.cat([self._logits(rows) for rows in features.split(CHUNK)])

    def _logits(self, features: Tensor) -> Tensor:
        near = F.normalize(features - self.mean) @ self.rows.T
        least = near.topk(self.neighbours).values[:, -1:]
        counts = (near >= least).to(self.votes) @ self.votes
        shares = counts / counts.sum(1, keepdim=True)
        return torch.where(shares > 0, shares.log(), ABSENT)
