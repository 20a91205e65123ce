"""What every merging method returns: a shared part, and parts that are exclusive to one expert each.

The weights for an input x are ``shared + always + sum_t w_t(x) * exclusive_t`` (Twin-Merging, Eq. 3, has no *always*).
A static method has no exclusive parts; how w(x) is found is not the method's business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from twinbench.weights.parts import Computed, Part, dense, is_zero, kind, stored
from twinbench.weights.state_dict import StateDict

Parts = Mapping[str, Part]  # by tensor name; a name without a part adds nothing


class Gate(Protocol):
    """Finds the weights of a linear layer's exclusive parts from that layer's own input."""

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weights (..., experts) of inputs (..., d_in); ``mask`` says which tokens (texts, tokens) are no padding."""

    def to(self, device: torch.device) -> "Gate":
        """The same gate on a device."""

    def stored(self) -> dict[str, Tensor]:
        """The tensors that would be written, by suffix."""


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        shared: the state dict that every input meets.
        exclusive: per expert its own parts.
        always: parts that are added for every input, beside ``shared``, whose tensors stay as they are.
        common: by name the tensors that `Masked` parts of that name refer to; each is stored once for all of them.
        gates: by the name of a linear layer's weight what finds w(x) there, if a route is taken per layer.
    """

    shared: Mapping[str, Tensor]
    exclusive: Mapping[str, Parts] = field(default_factory=dict)
    always: tuple[Parts, ...] = ()
    common: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Gate] = field(default_factory=dict)


def materialize(merged: Merged, *, progress: str | None = None) -> Merged:
    """Compute every tensor of a merge once and keep it; parts and common tensors that are exactly zero are left out.

    It goes name by name, so a method that remembers its last common tensor makes each once, and all parts hold it.
    Dense matrices of an expert are as large as the expert, and mostly a subtraction: each use computes them again.

    Args:
        progress: label of a progress bar over tensors, or None for no bar.
    """
    kept: list[dict] = [{} for _ in (*merged.exclusive, *merged.always)]
    sources = [merged.shared, merged.common, *merged.exclusive.values(), *merged.always]
    results = shared, common, *_ = [{}, {}, *kept]
    names = dict.fromkeys(name for source in sources for name in source)
    with tqdm(total=sum(map(len, sources)), desc=progress, unit="tensor", leave=False, disable=progress is None) as bar:
        for name in names:
            for source, result in zip(sources, results, strict=True):
                if name in source:
                    part = source[name]
                    if result is shared or not is_zero(part):
                        result[name] = again(source, name, part) if any(result is own for own in kept) else part
                    bar.update()
    exclusive = dict(zip(merged.exclusive, kept, strict=False))
    return Merged(shared, exclusive, tuple(kept[len(exclusive) :]), common, dict(merged.gates))


def again(source: Parts, name: str, part: Part) -> Part:
    """The part, or for a dense matrix how to compute it anew."""
    if not isinstance(part, Tensor) or part.dim() < 2:
        return part
    return Computed(partial(source.__getitem__, name), part.dim())


def with_route(merged: Merged, weights: Sequence[float]) -> dict[str, Tensor]:
    """The dense state dict of one route: shared + always + sum_t w_t * exclusive_t.

    Args:
        weights: one weight per expert, in the order of ``merged.exclusive``.
    """
    state = dict(merged.shared)
    weighed = [*((1.0, parts) for parts in merged.always), *zip(weights, merged.exclusive.values(), strict=True)]
    for weight, parts in weighed:
        if weight:
            for name, part in parts.items():
                state[name] = state[name] + weight * dense(part).to(state[name].dtype)
    return state


def for_every_input(merged: Merged) -> Mapping[str, Tensor]:
    """The dense state dict that every route begins with: shared + always. Tensors are computed on access."""
    if not merged.always:
        return merged.shared

    def tensor(name: str) -> Tensor:
        parts = tuple({name: parts[name]} for parts in merged.always if name in parts)
        return with_route(Merged({name: merged.shared[name]}, always=parts), [])[name]

    return StateDict(merged.shared, tensor)


def shared_bytes(merged: Merged, written: int | None = None) -> int:
    """Stored size of all that is not exclusive to an expert: shared and common tensors, and each of *always*.

    Args:
        written: size of the files that already hold the shared tensors, if these are too large to serialize for
            measuring.
    """
    more = [*([merged.common] if merged.common else []), *map(_tensors, merged.always)]
    return (stored_bytes(merged.shared) if written is None else written) + sum(map(stored_bytes, more))


def exclusive_bytes(merged: Merged) -> int:
    """Stored size of the exclusive parts, a file per expert; 0 if there are none."""
    return sum(stored_bytes(_tensors(parts)) for parts in merged.exclusive.values())


def gate_bytes(merged: Merged) -> int:
    """Stored size of the gates, one file; 0 if there are none."""
    tensors = {f"{name}.{suffix}": t for name, gate in merged.gates.items() for suffix, t in gate.stored().items()}
    return stored_bytes(tensors) if tensors else 0


def exclusive_kind(merged: Merged) -> str:
    """How the exclusive parts are stored: "none", "dense", "mask", or such as "low-rank + dense vectors"."""
    parts = [part for own in merged.exclusive.values() for part in own.values()]
    found = sorted({kind(part) for part in parts} - {"dense"})
    whole = [part.dim for part in parts if isinstance(part, Computed)]
    whole += [part.dim() for part in parts if isinstance(part, Tensor)]
    if whole:
        found.append("dense vectors" if found and max(whole) < 2 else "dense")
    return " + ".join(found) or "none"


def stored_bytes(state: Mapping[str, Tensor]) -> int:
    """Size in bytes of the safetensors file that holds these tensors."""
    return len(save({name: tensor.contiguous() for name, tensor in state.items()}))


def _tensors(parts: Parts) -> dict[str, Tensor]:
    """What would be written for parts, by tensor name and suffix."""
    return {f"{name}.{suffix}": tensor for name, part in parts.items() for suffix, tensor in stored(part).items()}
