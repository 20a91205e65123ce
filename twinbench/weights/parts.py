"""A *part* is a difference of one tensor, in the form in which it is kept.

A plain tensor is a dense part. The other kinds are the classes here, and another kind is another class with the same
four names: ``kind``, ``dense()``, ``stored()`` and ``is_zero()``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """``left @ right``: (d_out, r) and (r, d_in), the singular values folded into one of them.

    A stack of matrices, such as the experts of a mixture in one tensor, has stacks of both factors.
    """

    left: Tensor
    right: Tensor

    kind = "low-rank"

    def dense(self) -> Tensor:
        return self.left @ self.right

    def stored(self) -> dict[str, Tensor]:
        return {"left": self.left.contiguous(), "right": self.right.contiguous()}

    def is_zero(self) -> bool:
        return self.left.shape[-1] == 0


class Sparse(NamedTuple):
    """The kept values of a tensor in row-major order, and one bit per element that says which they are."""

    values: Tensor
    bits: Tensor
    shape: tuple[int, ...]

    kind = "sparse"

    def dense(self) -> Tensor:
        full = self.values.new_zeros(self.shape).flatten()
        full[unpacked(self.bits, full.numel())] = self.values
        return full.view(self.shape)

    def stored(self) -> dict[str, Tensor]:
        return {"values": self.values, "bits": self.bits}

    def is_zero(self) -> bool:
        return not self.values.any()


class Masked(NamedTuple):
    """``scale * mask * of``: one bit per element of a tensor that several parts refer to.

    That tensor is stored once, as `merging.merged.Merged.common`, and not with the part.

    Attributes:
        bits: the mask, as `packed` makes it.
        scale: a number, of no dimension.
        of: the common tensor, of the part's shape.
    """

    bits: Tensor
    scale: Tensor
    of: Tensor

    kind = "mask"

    def dense(self) -> Tensor:
        kept = unpacked(self.bits, self.of.numel()).view(self.of.shape)
        return torch.where(kept, self.scale * self.of, 0)

    def stored(self) -> dict[str, Tensor]:
        return {"bits": self.bits, "scale": self.scale}

    def is_zero(self) -> bool:
        return not (self.scale and self.bits.any() and self.of.any())


class Computed(NamedTuple):
    """A dense part that is computed each time it is asked for.

    Attributes:
        make: computes it.
        dim: its number of dimensions.
    """

    make: Callable[[], Tensor]
    dim: int

    kind = "dense"

    def dense(self) -> Tensor:
        return self.make()

    def stored(self) -> dict[str, Tensor]:
        return stored(self.make())

    def is_zero(self) -> bool:
        return is_zero(self.make())


Part = Tensor | LowRank | Sparse | Masked | Computed


def kind(part: Part) -> str:
    """How a part is kept, in a word."""
    return "dense" if isinstance(part, Tensor) else part.kind


def dense(part: Part) -> Tensor:
    """The tensor that a part stands for."""
    return part if isinstance(part, Tensor) else part.dense()


def stored(part: Part) -> dict[str, Tensor]:
    """The tensors that would be written for a part, by suffix."""
    return {"delta": part.contiguous()} if isinstance(part, Tensor) else part.stored()


def is_zero(part: Part) -> bool:
    """Whether the part changes nothing, so that it need not be stored."""
    return not part.any() if isinstance(part, Tensor) else part.is_zero()


def packed(mask: Tensor) -> Tensor:
    """A mask in row-major order, eight elements to a byte of uint8, the first in the lowest bit."""
    flat = mask.flatten()
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, length: int) -> Tensor:
    """The first ``length`` elements of a packed mask, flat."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).flatten()[:length].bool()
