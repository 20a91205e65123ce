"""T-Switch: "Less is More: Efficient Model Merging with Binary Task Switch", Qi et al., CVPR 2025, arXiv 2412.00054.

A task vector becomes signs with one size. Per tensor the largest ``density`` share of its positive values is kept, and
that of its negative ones; with K the kept values ``exclusive_t = sgn(K) ||K||_2 / ||sgn(K)||_2``, ``shared = base``,
and w is one-hot at the known task. The paper's drop rate is 1 - ``density``.

It is stored as one bit a weight that says what is kept, one a kept weight for its sign, and a number per tensor. The
authors' packing by groups of four takes about as much.

Departure from their code: counts are rounded, where it cuts them; a side whose count is 0 is dropped, where it is kept
whole.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.parts import packed, unpacked
from twinbench.weights.state_dict import StateDict

ROUTE = "task"


class Switch(NamedTuple):
    """``scale`` with a sign where a bit is set, 0 elsewhere: a part (`twinbench.weights.parts`) of a bit a weight."""

    bits: Tensor
    signs: Tensor
    scale: Tensor
    shape: tuple[int, ...]

    kind = "signs"

    def dense(self) -> Tensor:
        kept = unpacked(self.bits, self.shape.numel())
        values = torch.zeros(self.shape.numel(), device=self.bits.device)
        positive = unpacked(self.signs, int(kept.sum()))
        values[kept] = torch.where(positive, self.scale, -self.scale)
        return values.view(self.shape)

    def stored(self) -> dict[str, Tensor]:
        return {"bits": self.bits, "signs": self.signs, "scale": self.scale}

    def is_zero(self) -> bool:
        return not self.scale


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, density: float) -> Merged:
    """Keep the signs of each task's largest values, and their size.

    Args:
        density: share kept of the positive and of the negative values of each tensor, in (0, 1].

    Raises:
        ValueError: density is out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    names = [name for name in base if base[name].is_floating_point()]

    def part(task: str, name: str) -> Switch:
        return switch(experts[task][name].float() - base[name].float(), density)

    return Merged(base, {task: StateDict(names, lambda name, task=task: part(task, name)) for task in experts})


def switch(vector: Tensor, density: float) -> Switch:
    """The signs of a task vector's largest positive and negative values."""
    flat = vector.flatten()
    kept = _largest(flat, density) | _largest(-flat, density)
    scale = flat[kept].square().mean().sqrt() if kept.any() else flat.new_zeros(())
    return Switch(packed(kept), packed(flat[kept] > 0), scale, vector.shape)


def _largest(values: Tensor, density: float) -> Tensor:
    """A mask of the largest share of those above 0; of equal ones the first."""
    above = values.clamp(min=0)
    count = round(density * int((above > 0).sum()))
    return torch.zeros_like(values, dtype=torch.bool).index_fill_(0, above.topk(count).indices, True)
