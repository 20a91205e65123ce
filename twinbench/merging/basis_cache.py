"""Singular vectors remembered on disk, so that a sweep over ranks factors every matrix once.

The key is the matrix itself: jobs, processes and later sweeps that ask for the same difference of weights share it, and
nothing else can be mistaken for it. One file holds the (n, n) vectors of one matrix as rows, as they are computed and
multiplied; every rank is a slice without a copy. Damage to the files, and a disk that is full or read-only, cost a
warning and the work again, not the run.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twinbench.merging.compress import basis
from twinbench.system.files import new_file

LIMIT = 8 * 2**30  # bytes on disk; the files used longest ago go first
DAMAGED = "damaged factors are computed again"


def remembered_basis(folder: Path, device: str) -> Callable[[Tensor], Tensor]:
    """A `basis` that looks into ``folder`` first and leaves there what it had to compute on ``device``."""

    def remembered(matrix: Tensor) -> Tensor:
        path = folder / f"{content_key(matrix)}.safetensors"
        rows = _kept(path)
        if rows is None:
            rows = basis(matrix.to(device)).cpu().T.contiguous()
            _keep(path, rows)
        return rows.T.to(matrix.device)

    return remembered


def content_key(matrix: Tensor) -> str:
    """128 bits over a matrix's shape, dtype and elements."""
    digest = xxhash.xxh3_128(f"rows {tuple(matrix.shape)} {matrix.dtype}".encode())
    digest.update(matrix.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def _kept(path: Path) -> Tensor | None:
    """The rows of a file, or None where there is none that holds what was written; one of before had no hash."""
    try:
        with safe_open(path, framework="pt") as file:
            written, rows = (file.metadata() or {}).get("xxh3"), file.get_tensor("rows")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        written, rows = "unreadable", None
    if rows is None or written != content_key(rows):
        if written:
            _warn(path.parent, DAMAGED)
        return None
    with suppress(OSError):  # a cache that may only be read
        os.utime(path)
    return rows


def _keep(path: Path, rows: Tensor) -> None:
    try:
        with new_file(path) as part:
            save_file({"rows": rows}, part, metadata={"xxh3": content_key(rows)})
        _evict(path.parent, LIMIT)
    except (OSError, SafetensorError) as error:
        _warn(path.parent, f"factors are not kept ({getattr(error, 'strerror', None) or error})")


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
