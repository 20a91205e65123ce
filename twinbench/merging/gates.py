"""Gates: what finds the weights of a linear layer's exclusive parts from the layer's own input (`ROUTE = "layer"`)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from twinbench.system.mistakes import Mistake


@dataclass(frozen=True)
class Projections:
    """Asks how much of an input lies in the directions that each expert's change of the layer reads (SMILE).

    Attributes:
        directions: (experts, k, d_in), per expert orthonormal rows; zeros where an expert has fewer than k.
        top_k: experts that are kept for an input; of equal ones at the end all are.
    """

    directions: Tensor
    top_k: int

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Softmax of ``||directions_i x||_2`` over the ``top_k`` largest, and 0 for the other experts; per token.

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


@dataclass(frozen=True)
class Prototypes:
    """Asks which expert's mean input a text's mean input is nearest to, by its direction (ESM++).

    Attributes:
        means: (experts, d_in), of unit length.
    """

    means: Tensor

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """One-hot at the expert with the largest cosine, the same for all tokens of a text.

        Args:
            x: (texts, tokens, d_in), or (texts, d_in).
            mask: (texts, tokens), which tokens are no padding; None: all.

        Returns:
            (..., experts), in float32.
        """
        with torch.autocast(x.device.type, enabled=False):
            nearest = (text_means(x.float(), mask) @ self.means.T).argmax(-1)
        chosen = torch.nn.functional.one_hot(nearest, len(self.means)).float()
        return chosen[:, None].expand(*x.shape[:-1], -1) if x.dim() == 3 else chosen

    def to(self, device: torch.device) -> "Prototypes":
        """The same gate on a device."""
        return Prototypes(self.means.to(device))

    def stored(self) -> dict[str, Tensor]:
        """The tensors that would be written, by suffix."""
        return {"means": self.means}


def text_means(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean (texts, d) of each text's tokens that are no padding.

    Args:
        x: (texts, tokens, d), or (texts, d) where a layer sees one vector of each.
        mask: (texts, tokens); None: no token is padding.

    Raises:
        ValueError: the layer's texts and tokens are not those of the mask.
    """
    if x.dim() == 2 and (mask is None or len(x) == len(mask)):
        return x
    if x.dim() != 3 or (mask is not None and x.shape[:2] != mask.shape):
        given = "no mask" if mask is None else f"a mask of {tuple(mask.shape)} tokens"
        raise Mistake(f"a mean over a text's tokens needs inputs (texts, tokens, d), got {tuple(x.shape)} and {given}")
    if mask is None:
        return x.mean(1)
    kept = mask.to(x.dtype)[..., None]
    return (x * kept).sum(1) / kept.sum(1).clamp(min=1)
