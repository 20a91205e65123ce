"""Compression of a RoBERTa-base expert: our factors against torch.linalg.svd, and a sweep over ranks against one rank.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/compress.py

Writes results/benchmarks/compress.md and .json. Ratios are within one run.
"""

import json
import tempfile
import time
from pathlib import Path

import torch

from twinbench.merging.compress import basis, svd
from twinbench.prepared.basis import remembered
from twinbench.records.provenance import versions
from twinbench.system.device import machine
from twinbench.weights.parts import dense

RESULTS = Path(__file__).parents[2] / "results" / "benchmarks"
SHAPES = {"attention": (768, 768), "feed-forward": (3072, 768), "embedding": (50265, 768)}
RANK = 76
SWEEP = (384, 230, 153, 76, 38, 7, 3, 1)  # the paper's eight sparsities, 50 % to 99.8 %
LAYERS = 2  # of 12; every layer costs the same


def seconds(work, repeat: int = 3) -> float:
    """Least of a few timings of ``work()``."""
    found = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def one_matrix(shape: tuple[int, int]) -> dict:
    matrix = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = seconds(lambda: svd(matrix, RANK)), seconds(lambda: torch.linalg.svd(matrix, full_matrices=False), 1)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
    error = ((dense(svd(matrix, RANK)).double() - best).norm() / best.norm()).item()
    return {"ours_s": ours, "torch_s": theirs, "ratio": theirs / ours, "relative_error": error}


def sweep() -> dict:
    """One rank, then eight, each from an empty store of factors, over the matrices of a few layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    matrices = [1e-3 * torch.randn(shape, generator=generator) for shape in shapes * LAYERS]

    def run(ranks) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for rank in ranks:
                basis_of = remembered(Path(folder), "cpu")
                for matrix in matrices:
                    svd(matrix, rank, basis_of)

    one, eight = seconds(lambda: run([RANK])), seconds(lambda: run(SWEEP))
    again = seconds(lambda: [svd(matrix, rank, basis) for rank in SWEEP for matrix in matrices], 1)
    return {"one_rank_s": one, "eight_ranks_s": eight, "ratio": eight / one, "eight_ranks_not_remembered_s": again}


def main() -> None:
    matrices = {name: one_matrix(shape) for name, shape in SHAPES.items()}
    swept = sweep()
    lines = [
        f"# Compression\n\n{machine()}, torch {versions()['torch']}, {torch.get_num_threads()} threads, float32.\n"
    ]
    lines.append(f"Rank {RANK}, seconds:\n\n| matrix | ours | torch.linalg.svd | ratio | relative error of ours |")
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, row in matrices.items():
        lines.append(
            f"| {name} {SHAPES[name][0]} x {SHAPES[name][1]} | {row['ours_s']:.3f} | {row['torch_s']:.3f} "
            f"| {row['ratio']:.1f} | {row['relative_error']:.1e} |"
        )
    lines.append(f"\nRanks {', '.join(map(str, SWEEP))} over the matrices of {LAYERS} layers, seconds:\n")
    lines.append("| one rank | eight ranks | ratio | eight ranks, factored each time |\n| ---: | ---: | ---: | ---: |")
    lines.append(
        f"| {swept['one_rank_s']:.2f} | {swept['eight_ranks_s']:.2f} | {swept['ratio']:.2f} "
        f"| {swept['eight_ranks_not_remembered_s']:.2f} |"
    )
    table = "\n".join(lines) + "\n"
    print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "compress.md").write_text(table)
    found = {"machine": machine(), "versions": versions(), "matrices": matrices, "sweep": swept}
    (RESULTS / "compress.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
