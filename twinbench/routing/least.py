"""The expert whose answer is least: ``w = softmax(-answers / T)``. It learns from no rows.

For what experts say of a row (`twinbench.routing.of_experts`): distances, as MASS has them, or entropies, as in DaWin.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from twinbench.routing.recipe import checked

DRAWS = {}


@dataclass(frozen=True)
class Least:
    """How sharp the weights are.

    Args:
        temperature: T, above 0.

    Raises:
        ValueError: it is out of range.
    """

    temperature: float

    def __post_init__(self):
        checked("model", self, temperature=(self.temperature > 0, "above 0"))

    def ready(self) -> "Answers":
        return Answers(self.temperature)


class Answers(nn.Module):
    """(n, experts) answers to logits of the same shape."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def logits(self, answers: Tensor) -> Tensor:
        return -answers / self.temperature
