"""What every merging method returns: a shared part, and parts that are exclusive to one expert each.

The weights for an input x are ``shared + sum_t w_t(x) * exclusive_t`` (Twin-Merging, Eq. 3). A static method has no
exclusive parts; how w(x) is found is not the method's business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from twinbench.merging.compress import LowRank, Part, Sparse, dense, is_zero, tensors


@dataclass(frozen=True)
class Merged:
    """A shared state dict, and per expert its exclusive parts by tensor name (a name without a part adds nothing)."""

    shared: Mapping[str, Tensor]
    exclusive: Mapping[str, Mapping[str, Part]] = field(default_factory=dict)


def materialize(merged: Merged, *, progress: str | None = None) -> Merged:
    """Compute every tensor of a merge once and keep it; parts that are exactly zero are left out.

    Args:
        progress: label of a progress bar over tensors, or None for no bar.
    """
    total = len(merged.shared) + sum(len(parts) for parts in merged.exclusive.values())
    with tqdm(total=total, desc=progress, unit="tensor", leave=False, disable=progress is None) as bar:
        shared = {name: _counted(tensor, bar) for name, tensor in merged.shared.items()}
        exclusive = {
            expert: {name: _counted(part, bar) for name, part in parts.items() if not is_zero(part)}
            for expert, parts in merged.exclusive.items()
        }
    return Merged(shared, exclusive)


def with_route(merged: Merged, weights: Sequence[float]) -> dict[str, Tensor]:
    """The dense state dict of one route: shared + sum_t w_t * exclusive_t.

    Args:
        weights: one weight per expert, in the order of ``merged.exclusive``.
    """
    state = dict(merged.shared)
    for weight, parts in zip(weights, merged.exclusive.values(), strict=True):
        if weight:
            for name, part in parts.items():
                state[name] = state[name] + weight * dense(part).to(state[name].dtype)
    return state


def shared_bytes(merged: Merged) -> int:
    """Stored size of the shared part."""
    return stored_bytes(merged.shared)


def exclusive_bytes(merged: Merged) -> int:
    """Stored size of the exclusive parts, a file per expert; 0 if there are none."""
    return sum(
        stored_bytes({f"{name}.{suffix}": t for name, part in parts.items() for suffix, t in tensors(part).items()})
        for parts in merged.exclusive.values()
    )


def exclusive_kind(merged: Merged) -> str:
    """How the exclusive parts are stored: "none", "dense", "low-rank", "sparse", or "low-rank + dense vectors"."""
    parts = [part for own in merged.exclusive.values() for part in own.values()]
    kinds = {"low-rank": LowRank, "sparse": Sparse}
    found = [name for name, kind in kinds.items() if any(isinstance(part, kind) for part in parts)]
    whole = [part.dim() for part in parts if isinstance(part, Tensor)]
    if whole:
        found.append("dense vectors" if found and max(whole) < 2 else "dense")
    return " + ".join(found) or "none"


def stored_bytes(state: Mapping[str, Tensor]) -> int:
    """Size in bytes of the safetensors file that holds these tensors."""
    return len(save({name: tensor.contiguous() for name, tensor in state.items()}))


def _counted(value, bar):
    bar.update()
    return value
