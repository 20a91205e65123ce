"""Which samples of a batch take which experts: the plan that all layers of one routed forward follow."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from twinbench.system.mistakes import Mistake

DENSE = 0.5  # share of all products above which one block of all experts is faster than groups
SHARED = 24  # from this many rows per route on, merging each route is faster than running the parts beside the model


def merges_each(routes: int, rows: int, experts: int) -> bool:
    """Whether to merge each route and run static models, instead of running the parts beside the shared one."""
    return routes <= max(experts, rows // SHARED)


class Block(NamedTuple):
    """Groups of equally many samples and experts, which share a batched product."""

    experts: range  # of all groups, in their order
    samples: Tensor | slice  # (groups * size,); a slice where they follow one another in the batch
    weights: Tensor  # (groups, size, experts of one group)

    def to(self, device: torch.device) -> "Block":
        samples = self.samples if isinstance(self.samples, slice) else self.samples.to(device)
        return Block(self.experts, samples, self.weights.to(device))


class Routes:
    """The routes of the batch that is in the model now.

    Attributes:
        experts: how many weights a sample has.
        always: how many of them, the first, are 1 for every sample; nobody sets these.
    """

    def __init__(self, experts: int, tolerance: float, device: torch.device, always: int = 0):
        self.experts, self.tolerance, self.device, self.always = experts, tolerance, device, always
        self.batch, self.lengths = 1, {1}  # rows of the model's inputs, and how many tokens each may have
        self._weights, self._groups = None, []

    @property
    def weights(self) -> Tensor:
        """The weights of all experts, (samples, experts), those that are always 1 included.

        What is set are router weights, without the ones: (samples, experts - always). They hold until others are set,
        through all steps of a generation. A module may see each sample several times in a row (beams, tokens flattened
        into the batch).
        """
        return self._weights

    @weights.setter
    def weights(self, weights: Tensor) -> None:
        if weights.dim() != 2 or weights.shape[1] != self.experts - self.always:
            wanted = f"(samples, {self.experts - self.always} experts)"
            raise Mistake(f"weights must be {wanted}, got {tuple(weights.shape)}")
        weights = torch.nn.functional.pad(weights, (self.always, 0), value=1.0)
        columns = zip(*weights.tolist(), strict=True)  # on the host, once a batch: layers never wait for it
        taken = [[i for i, weight in enumerate(column) if not abs(weight) <= self.tolerance] for column in columns]
        self._weights, self._elsewhere, self._groups = weights.to(self.device, torch.float32), {}, []
        self.batch = 1
        self.single = {t: _block(range(t, t + 1), taken, self._weights) for t in range(self.experts) if taken[t]}
        self.blocks = [_block(experts, taken, self._weights) for experts in _alike(taken)]
        if sum(block.weights.numel() for block in self.blocks) > DENSE * weights.numel():
            self.blocks = [Block(range(self.experts), slice(0, len(weights)), self._weights[None])]

    def of(self, weights: Tensor, batch: int, tolerance: float | None = None) -> "Routes":
        """Routes of other weights, those that are always 1 included, for a batch of so many rows."""
        other = Routes(self.experts, self.tolerance if tolerance is None else tolerance, self.device)
        other.weights, other.batch, other.lengths = weights, batch, self.lengths
        return other

    def groups(self) -> list[tuple[Tensor, "Routes"]]:
        """Per distinct route the samples that take it, and routes that have it for a single sample."""
        if not self._groups:
            distinct, which = self._weights.cpu().unique(dim=0, return_inverse=True)
            self._groups = [
                ((which == number).nonzero().flatten(), self.of(route[None], 1))
                for number, route in enumerate(distinct)
            ]
        return self._groups

    @contextmanager
    def narrowed(self, other: "Routes") -> Iterator[None]:
        """Be like others while the context lasts: all who hold these routes see theirs."""
        kept = self.__dict__
        self.__dict__ = dict(other.__dict__)
        try:
            yield
        finally:
            self.__dict__ = kept

    def on(self, device: torch.device) -> "Routes":
        """The same routes for layers that lie on another device, as those of a model spread over several do."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            moved = copy.copy(self)
            moved._weights = self._weights.to(device)
            moved.blocks = [block.to(device) for block in self.blocks]
            moved.single = {t: block.to(device) for t, block in self.single.items()}
            self._elsewhere[device] = moved
        return self._elsewhere[device]


def _alike(taken: list[list[int]]) -> list[range]:
    """Ranges of experts that equally many samples take, without those that none takes."""
    ranges = []
    for size, experts in groupby(range(len(taken)), key=lambda t: len(taken[t])):
        first, *rest = experts
        if size:
            ranges.append(range(first, first + len(rest) + 1))
    return ranges


def _block(experts: range, taken: list[list[int]], weights: Tensor) -> Block:
    """One group for each of the experts: all samples that take it, which are equally many."""
    groups = torch.tensor([taken[t] for t in experts])
    samples, first = groups.flatten(), int(groups[0, 0])
    in_order = torch.equal(samples, torch.arange(first, first + len(samples)))
    own = weights.T[experts.start : experts.stop].gather(1, groups.to(weights.device))
    where = slice(first, first + len(samples)) if in_order else samples.to(weights.device)
    return Block(experts, where, own[..., None])
