"""Writing a checkpoint while it is computed: standard safetensors, sharded or whole, and all of it or nothing."""

import json
import os
from collections.abc import Mapping
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from twinbench.system.files import new_folder
from twinbench.system.mistakes import Mistake
from twinbench.weights.state_dict import Layout, concurrently, listed

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # safetensors' names


def write_checkpoint(
    folder: Path, state: Mapping[str, Tensor], layout: Layout, *, shard_bytes: int, metadata: Mapping[str, str]
) -> None:
    """Write a new folder with the weights of ``state``, as `write_weights` does; it appears whole or not at all.

    Raises:
        FileExistsError: the folder exists and is not empty.
        OSError: the disk is full, or cannot be written to.
    """
    with new_folder(folder) as part:
        write_weights(part, state, layout, shard_bytes=shard_bytes, metadata=metadata)


def write_weights(
    folder: Path, state: Mapping[str, Tensor], layout: Layout, *, shard_bytes: int, metadata: Mapping[str, str]
) -> None:
    """Write ``model.safetensors``, or shards and their index, into a folder; a tensor is asked for when its turn comes.

    Several are computed and written at a time, one by each thread of `concurrently`.

    Args:
        layout: what ``state`` holds, known beforehand; for a merge it is the layout of its base.
        shard_bytes: largest size of a file's tensors, at least 1; a larger tensor has a file of its own.
        metadata: for the files' headers, beside the format that transformers asks for.

    Raises:
        ValueError: names, dtypes or shapes of ``state`` are not those of ``layout``.
    """
    if shard_bytes < 1:
        raise Mistake(f"shard_bytes must be at least 1, got {shard_bytes}")
    unlike = sorted(layout.keys() ^ state.keys())
    if unlike:
        raise Mistake(f"cannot write {folder.name}: only one of layout and weights has {listed(unlike)}")
    shards, total = _shards(layout, shard_bytes), sum(map(_size, layout.values()))
    digits = f"{len(shards):05d}"
    files = [f"model-{i:05d}-of-{digits}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    with tqdm(total=total, desc="writing weights", unit="B", unit_scale=True, leave=False) as bar:
        for file, names in zip(files, shards, strict=True):
            _write_file(folder / file, state, {name: layout[name] for name in names}, metadata, bar)
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(layout: Layout, shard_bytes: int) -> list[list[str]]:
    """Names in files of at most so many bytes; wide dtypes come first, so that every tensor is aligned to its own."""
    shards, filled = [[]], 0
    for name in sorted(layout, key=lambda name: -DTYPES[layout[name][0]].itemsize):
        if shards[-1] and filled + _size(layout[name]) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(layout[name])
    return shards


def _write_file(path: Path, state: Mapping[str, Tensor], layout: Layout, metadata: Mapping[str, str], bar) -> None:
    """Each tensor goes to its place as soon as it is computed, large ones first so that no thread is left with one."""
    header = _header(layout, metadata)
    starts = accumulate(map(_size, layout.values()), initial=len(header))
    places = dict(zip(layout, starts, strict=False))  # the last start is the file's end
    with path.open("wb") as file:

        def fill(name: str) -> None:
            _write_at(file.fileno(), _bytes(name, state[name], layout[name]), places[name])
            bar.update(_size(layout[name]))

        _write_at(file.fileno(), memoryview(header), 0)
        concurrently(fill, sorted(layout, key=lambda name: -_size(layout[name])))


def _write_at(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)  # what one call writes is limited to 2 GiB
        data, place = data[written:], place + written


def _header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    """The length of a JSON object in 8 bytes, and the object: per tensor its dtype, shape and place in the rest."""
    header, end = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + _size((dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(name: str, tensor: Tensor, entry: tuple[str, tuple[int, ...]]) -> memoryview:
    dtype, shape = entry
    if tensor.dtype != DTYPES[dtype] or tuple(tensor.shape) != shape:
        got = f"{tensor.dtype} {list(tensor.shape)}"
        raise Mistake(f"cannot write {name}: it is {got}, the layout says {DTYPES[dtype]} {list(shape)}")
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _size(entry: tuple[str, tuple[int, ...]]) -> int:
    return DTYPES[entry[0]].itemsize * prod(entry[1])
