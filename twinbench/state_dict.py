"""State dicts whose tensors are computed or read when they are asked for, and strict checks between them.

A merge is a function from a tensor's name to a tensor, so `StateDict` serves both for a checkpoint on disk and for a
merged model that has not been computed yet: N experts never need to be in memory together.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SHOWN = 3  # differing names that an error lists


class StateDict(Mapping[str, Tensor]):
    """Names and a function that gives the tensor of a name, called again on every access."""

    def __init__(self, names: Iterable[str], tensor: Callable[[str], Tensor]):
        self._names = dict.fromkeys(names)
        self._tensor = tensor

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_checkpoint(folder: Path) -> StateDict:
    """Open a Hugging Face folder's safetensors, whole or sharded; tensors are read on access through a memory map.

    Raises:
        FileNotFoundError: there is no safetensors file, or a shard named in the index is missing.
        ValueError: the folder has only pickled weights, or a file is truncated or not safetensors.
    """
    owner = {}
    for path in _weight_files(folder):
        file = _open(path)
        owner |= dict.fromkeys(file.keys(), file)
    return StateDict(owner, lambda name: owner[name].get_tensor(name))


def layout(checkpoint: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes in a folder's safetensors, from the headers alone."""
    found = {}
    for path in _weight_files(checkpoint):
        file = _open(path)
        for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
            tensor = file.get_slice(name)
            found[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


def check_same_layout(reference: Mapping, other: Mapping, who: str, than: str = "the base") -> None:
    """Compare two results of `layout`.

    Raises:
        ValueError: names, shapes or dtypes differ; the first three that differ are named.
    """
    missing = [name for name in reference if name not in other]
    surplus = [name for name in other if name not in reference]
    if missing or surplus:
        parts = [f"lacks {_listed(missing)}"] if missing else []
        parts += [f"has unknown {_listed(surplus)}"] if surplus else []
        raise ValueError(f"{who} does not fit {than}: it {' and '.join(parts)}")
    differing = [
        f"{name} is {_described(other[name])}, not {_described(reference[name])}"
        for name in reference
        if other[name] != reference[name]
    ]
    if differing:
        raise ValueError(f"{who} does not fit {than}: {_listed(differing, '; ')}")


def check_finite(state: Mapping[str, Tensor], who: str) -> None:
    """Read every tensor once.

    Raises:
        ValueError: some hold NaN or infinity; the first three are named.
    """
    # One sum per tensor instead of a mask as large as the tensor; a sum of finite fp32 weights cannot overflow in fp64.
    bad = [name for name, tensor in state.items() if not torch.isfinite(tensor.sum(dtype=torch.float64))]
    if bad:
        raise ValueError(f"{who}: NaN or infinite weights in {_listed(bad)}")


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> StateDict:
    """The tensors of ``state`` under other names: ``names`` maps new to old."""
    return StateDict(names, lambda name: state[names[name]])


def _described(entry: tuple[str, tuple[int, ...]]) -> str:
    return f"{entry[0]} {list(entry[1])}"


def _listed(names: list[str], separator: str = ", ") -> str:
    more = f" (+{len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [folder / shard for shard in shards]
        absent = [path.name for path in paths if not path.exists()]
        if absent:
            raise FileNotFoundError(f"{folder}: its index names {_listed(absent)}, which is not there")
        return paths
    path = folder / "model.safetensors"
    if path.exists():
        return [path]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder}: only pickled weights ({_listed(pickles)}), "
            "which can run code when read; convert them to model.safetensors"
        )
    raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from error
