"""``basis(matrix)``: singular vectors, remembered on disk, so that a sweep over ranks factors every matrix once.

The key is the matrix itself. One file holds the (n, n) vectors of one matrix as rows, as they are computed and
multiplied; every rank is a slice without a copy.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from twinbench.assets.sources import cache_dir
from twinbench.merging.compress import basis
from twinbench.weights.disk_cache import content_key, keep, kept

READS = "nothing"


def prepare(bench) -> Callable[[Tensor], Tensor]:
    """`twinbench.merging.compress.basis`, remembered; computed on the bench's device, or on the CPU without a bench."""
    return remembered(cache_dir() / "factors", bench.device if bench else "cpu")


def remembered(folder: Path, device: str) -> Callable[[Tensor], Tensor]:
    """A `basis` that looks into ``folder`` first and leaves there what it had to compute on ``device``."""

    def remembered_basis(matrix: Tensor) -> Tensor:
        path = folder / f"{content_key({'rows': matrix})}.safetensors"
        rows = kept(path)
        if rows is None:
            rows = basis(matrix.to(device)).cpu().T.contiguous()
            keep(path, rows)
        return rows.T.to(matrix.device)

    return remembered_basis
