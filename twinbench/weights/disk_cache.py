"""Tensors remembered on disk, so that a sweep computes each of them once.

The name of a file is a key of what its tensor was computed from: jobs, processes and later sweeps that ask for the same
share it, and nothing else can be mistaken for it. Damage to the files, and a disk that is full or read-only, cost a
warning and the work again, not the run.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twinbench.system.files import new_file
from twinbench.weights.state_dict import StateDict

LIMIT = 8 * 2**30  # bytes in a folder; the files used longest ago go first
DAMAGED = "damaged tensors are computed again"


def content_key(state: Mapping[str, Tensor], *words: str) -> str:
    """128 bits over the names, shapes, dtypes and elements of tensors, and over further words."""
    digest = xxhash.xxh3_128()
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().cpu().view(torch.uint8).numpy().data)
    for word in words:
        digest.update(word.encode())
    return digest.hexdigest()


def kept(path: Path) -> Tensor | None:
    """The tensor of a file, or None where there is no file that holds what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            written, rows = (file.metadata() or {}).get("xxh3"), file.get_tensor("rows")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        written, rows = "unreadable", None
    if rows is None or written != content_key({"rows": rows}):
        if written:  # files of older versions have no hash
            _warn(path.parent, DAMAGED)
        return None
    with suppress(OSError):  # a cache that may only be read
        os.utime(path)
    return rows


def keep(path: Path, rows: Tensor) -> bool:
    """Write a tensor to a file and make room for it; whether that went well."""
    try:
        with new_file(path) as part:
            save_file({"rows": rows}, part, metadata={"xxh3": content_key({"rows": rows})})
        _evict(path.parent, LIMIT)
    except (OSError, SafetensorError) as error:
        _warn(path.parent, f"tensors are not kept ({getattr(error, 'strerror', None) or error})")
        return False
    return True


def remembered(folder: Path, key: str, names: Iterable[str], make: Callable[[], Mapping[str, Tensor]]) -> StateDict:
    """Tensors that are computed together, and read one by one from the disk.

    Args:
        key: of what they are computed from.
        names: of all that ``make`` returns.
        make: called when a tensor is asked for that is not on the disk; tensors that cannot be kept stay in memory.
    """
    held = {}

    def tensor(name: str) -> Tensor:
        found = held.get(name)
        if found is None:
            found = kept(folder / f"{key}-{name}.safetensors")
        if found is None:
            made = make()
            found = made[name]
            held.update((n, t) for n, t in made.items() if not keep(folder / f"{key}-{n}.safetensors", t))
        return found

    return StateDict(names, tensor)


@cache  # once in a process
def _warn(folder: Path, message: str) -> None:
    print(f"{folder}: {message}", file=sys.stderr, flush=True)


def _evict(folder: Path, limit: int) -> None:
    """Remove the files used longest ago until the rest fits."""
    states = sorted((file.stat().st_mtime_ns, file.stat().st_size, file) for file in folder.glob("*.safetensors"))
    surplus = sum(size for _, size, _ in states) - limit
    for _, size, file in states:
        if surplus <= 0:
            return
        file.unlink(missing_ok=True)
        surplus -= size
