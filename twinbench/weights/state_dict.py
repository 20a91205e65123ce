"""State dicts whose tensors are computed or read when they are asked for, and strict checks between them.

A merge is a function from a tensor's name to a tensor, so `StateDict` serves both for a checkpoint on disk and for a
merged model that has not been computed yet: N experts never need to be in memory together.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twinbench.system.mistakes import Mistake

SHOWN = 3  # differing names that an error lists
PIECE = 1 << 17  # weights worked on at a time: few enough for caches, and enough for threads not to wait for Python
WORKERS = 8  # threads at most: each has a tensor in memory, and fewer than these use up a machine's bandwidth

Item = TypeVar("Item")
Result = TypeVar("Result")
Layout = dict[str, tuple[str, tuple[int, ...]]]  # per tensor its dtype, as safetensors calls it, and its shape
Combine = Callable[[Tensor, list[Tensor]], Tensor]  # from a base's piece and those of the experts, the merged piece


class StateDict(Mapping[str, Tensor]):
    """Names and a function that gives the tensor of a name, called again on every access."""

    def __init__(self, names: Iterable[str], tensor: Callable[[str], Tensor]):
        self._names = dict.fromkeys(names)
        self._tensor = tensor

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without the work for its tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def keeping_last(state: Mapping[str, Tensor]) -> StateDict:
    """The same tensors, of which the one asked for last is kept: whoever asks for it next gets the same memory."""
    last: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        if name not in last:
            last.clear()
            last[name] = state[name]
        return last[name]

    return StateDict(state, tensor)


def by_pieces(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    combine: Callable[[str], Combine],
) -> StateDict:
    """A merge that works weight by weight, in float32 and in cache-sized pieces; each tensor is read once,
    beside what ``combine(name)`` reads.

    What is not floating point (positions, counters) is the base's.

    Args:
        combine: from a tensor's name, the function of its pieces: called in order with the base's piece and those of
            the experts, flat float32 that may be views of their tensors and must not be written to.
    """

    def merged(name: str) -> Tensor:
        origin = base[name]
        if not origin.is_floating_point():
            return origin
        result = torch.empty_like(origin, memory_format=torch.contiguous_format)
        sources = [origin.flatten(), *(expert[name].flatten() for expert in experts.values())]
        targets, *parts = (tensor.split(PIECE) for tensor in (result.view(-1), *sources))
        with _torch_threads(1):
            merge_piece = combine(name)
            for target, first, *rest in zip(targets, *parts, strict=True):
                target.copy_(merge_piece(first.float(), [piece.float() for piece in rest]))
        return result

    return StateDict(base, merged)


def task_vectors(origin: Tensor, experts: Sequence[Tensor]) -> Iterator[Tensor]:
    """The experts' task vectors of a tensor beside each other, (T, n) in float32, a piece of the tensor at a time."""
    for first, *rest in zip(*(tensor.flatten().split(PIECE) for tensor in (origin, *experts)), strict=True):
        yield torch.stack([piece.float() for piece in rest]) - first.float()


def concurrently(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """A function's results for every item, in order, by several threads that share torch's cores between them.

    Raises:
        Exception: that of the first item in order that has one; items that are not begun then are left.
    """
    cores = torch.get_num_threads()
    workers = min(cores, WORKERS)
    with _torch_threads(cores // workers), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Give each operation of torch so many threads, here and in threads that are begun meanwhile.

    Torch joins its threads after every operation. On small pieces the wait dominates; if another process holds a core
    it is 100 times the work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_checkpoint(folder: Path) -> StateDict:
    """Open a Hugging Face folder's safetensors, whole or sharded; tensors are read on access through a memory map.

    Raises:
        FileNotFoundError: there is no safetensors file, or a shard named in the index is missing.
        ValueError: the folder has only pickled weights, a file is truncated or not safetensors, or the index and
            the shards do not name the same tensors.
    """
    owner = _owners(folder)
    return StateDict(owner, lambda name: owner[name].get_tensor(name))


def layout(checkpoint: Path) -> Layout:
    """Names, dtypes and shapes in a folder's safetensors, from the headers alone."""
    found = {}
    for name, file in _owners(checkpoint).items():
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
        parts = [f"lacks {listed(missing)}"] if missing else []
        parts += [f"has unknown {listed(surplus)}"] if surplus else []
        raise Mistake(f"{who} does not fit {than}: it {' and '.join(parts)}")
    differing = [
        f"{name} is {_described(other[name])}, not {_described(reference[name])}"
        for name in reference
        if other[name] != reference[name]
    ]
    if differing:
        raise Mistake(f"{who} does not fit {than}: {listed(differing, '; ')}")


def check_finite(state: Mapping[str, Tensor], who: str) -> None:
    """Read every tensor once.

    Raises:
        ValueError: some hold NaN or infinity; the first three are named.
    """
    bad = [name for name, tensor in state.items() if not all(map(_finite, tensor.flatten().split(PIECE)))]
    if bad:
        raise Mistake(f"{who}: NaN or infinite weights in {listed(bad)}")


def _finite(piece: Tensor) -> bool:
    """One sum instead of a mask as large; a sum of finite fp32 weights cannot overflow in fp64."""
    return bool(torch.isfinite(piece.sum(dtype=torch.float64)))


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> StateDict:
    """The tensors of ``state`` under other names: ``names`` maps new to old."""
    return StateDict(names, lambda name: state[names[name]])


def _described(entry: tuple[str, tuple[int, ...]]) -> str:
    return f"{entry[0]} {list(entry[1])}"


def listed(names: list[str], separator: str = ", ") -> str:
    """The first names for an error message, and how many more there are."""
    more = f" (+{len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more


def _owners(folder: Path) -> dict:
    """Per tensor of a checkpoint the open file that holds it."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        file = open_safetensors(_single_file(folder))
        return dict.fromkeys(file.keys(), file)
    places = _weight_map(index)
    shards = sorted(set(places.values()))
    absent = [shard for shard in shards if not (folder / shard).exists()]
    if absent:
        raise FileNotFoundError(f"{folder}: its index names {listed(absent)}, which is not there")
    surplus = sorted(path.name for path in folder.glob("model-*-of-*.safetensors") if path.name not in shards)
    if surplus:
        raise Mistake(f"{folder}: its index does not name the shard {listed(surplus)}")
    owner = {}
    for shard in shards:
        file = open_safetensors(folder / shard)
        held, named = set(file.keys()), [name for name, where in places.items() if where == shard]
        lacking, unnamed = [name for name in named if name not in held], sorted(held.difference(named))
        if lacking:
            raise Mistake(f"{folder}: its index places {listed(lacking)} in {shard}, which does not hold it")
        if unnamed:
            raise Mistake(f"{folder}: {shard} holds {listed(unnamed)}, which its index does not place there")
        owner |= dict.fromkeys(file.keys(), file)
    return owner


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise Mistake(f"{index}: not an index of shards, which is JSON with a weight_map ({error!r})") from error
    outside = [str(shard) for shard in places.values() if not isinstance(shard, str) or Path(shard).name != shard]
    if outside:
        raise Mistake(f"{index}: weight_map must name files beside it, got {listed(sorted(set(outside)))}")
    return places


def _single_file(folder: Path) -> Path:
    path = folder / "model.safetensors"
    if path.exists():
        return path
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise Mistake(
            f"{folder}: only pickled weights ({listed(pickles)}), "
            "which can run code when read; convert them to model.safetensors"
        )
    raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def open_safetensors(path: Path) -> safe_open:
    """Open one file.

    Raises:
        ValueError: it is truncated or not safetensors.
    """
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise Mistake(f"{path}: truncated, or not a safetensors file ({error})") from error
