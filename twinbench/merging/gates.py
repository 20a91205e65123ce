"""Gates: what finds the weights of a linear layer's exclusive parts from the layer's own input (`ROUTE = "layer"`)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projections:
    """Asks how much of an input lies in the directions that each expert's change of the layer reads (SMILE).

    Attributes:
        directions: (experts, k, d_in), per expert orthonormal rows; zeros where an expert has fewer than k.
        top_k: experts that are kept for an input; of equal ones at the end all are.
    """

    directions: Tensor
    top_k: int

    def weights(self, x: Tensor) -> Tensor:
        """Softmax of ``||directions_i x||_2`` over the ``top_k`` largest, and 0 for the other experts.

        Args:
            x: (..., d_in), of any floating dtype; the work is done in float32, so that few inputs are ties.

        Returns:
            (..., experts), in float32; each row sums to 1.
        """
        with torch.autocast(x.device.type, enabled=False):
            found = x.float() @ self.directions.flatten(0, 1).T
            logits = found.unflatten(-1, self.directions.shape[:2]).norm(dim=-1)
        least = logits.topk(self.top_k).values[..., -1:]
        return logits.masked_fill(logits < least, -torch.inf).softmax(-1)

    def to(self, device: torch.device) -> "Projections":
        """The same gate on a device."""
        return Projections(self.directions.to(device), self.top_k)

    def stored(self) -> dict[str, Tensor]:
        """The tensors that would be written, by suffix."""
        return {"directions": self.directions}
