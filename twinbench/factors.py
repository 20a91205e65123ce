"""Singular vectors remembered on disk, so that a sweep over ranks factors every matrix once.

The key is the matrix itself: jobs, processes and later sweeps that ask for the same difference of weights share it, and
nothing else can be mistaken for it. One file holds the (n, n) vectors of one matrix as rows, as they are computed and
multiplied; every rank is a slice without a copy.
"""

import os
from collections.abc import Callable
from pathlib import Path

import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from twinbench.compress import basis

LIMIT = 8 * 2**30  # bytes on disk; the files used longest ago go first


def remembered_basis(folder: Path, device: str) -> Callable[[Tensor], Tensor]:
    """A `basis` that looks into ``folder`` first and leaves there what it had to compute on ``device``."""

    def remembered(matrix: Tensor) -> Tensor:
        path = folder / f"{content_key(matrix)}.safetensors"
        try:
            vectors = load_file(path)["rows"].T
            os.utime(path)
        except FileNotFoundError:
            vectors = basis(matrix.to(device)).cpu()
            _keep(path, vectors)
        return vectors.to(matrix.device)

    return remembered


def content_key(matrix: Tensor) -> str:
    """128 bits over a matrix's shape, dtype and elements."""
    digest = xxhash.xxh3_128(f"rows {tuple(matrix.shape)} {matrix.dtype}".encode())
    digest.update(matrix.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def _keep(path: Path, vectors: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({"rows": vectors.T.contiguous()}, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    _evict(path.parent, LIMIT)


def _evict(folder: Path, limit: int) -> None:
    """Remove the files used longest ago until the rest fits."""
    states = sorted((file.stat().st_mtime_ns, file.stat().st_size, file) for file in folder.glob("*.safetensors"))
    surplus = sum(size for _, size, _ in states) - limit
    for _, size, file in states:
        if surplus <= 0:
            return
        file.unlink(missing_ok=True)
        surplus -= size
