"""Merging large sharded models disk to disk: does memory stay that of a few tensors?

    PYTHONPATH=. .venv/bin/python tests/benchmarks/sharded.py [--experts 4] [--layers 20]

Makes a base and experts of one billion parameters (random bfloat16 in Llama's shapes, several files each), merges them
in a process per method, and writes results/benchmarks/sharded.md and .json. It needs 2 GB of disk for each model.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from datetime import UTC, datetime
from math import prod
from pathlib import Path

from merge import RESULTS, measured, ours_command

METHODS = ("task_arithmetic", "ties", "dare")
SHARD_BYTES = 500 * 10**6
BAR = 3 * 10**9  # bytes of anonymous memory
LAYERS = 20
VOCABULARY, HIDDEN, INNER, KEYS = 32000, 2048, 5632, 256  # TinyLlama's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    shapes = llama(arguments.layers)
    size = 2 * sum(map(prod, shapes.values()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that gigabytes are removed then, too
    root = Path(tempfile.mkdtemp(prefix="twinbench-sharded-"))
    try:
        needed, free = (arguments.experts + 3) * size, shutil.disk_usage(root).free  # a result, and one to spare
        if free < needed:
            sys.exit(
                f"error: this needs {needed / 1e9:.0f} GB of disk for temporary files, {free / 1e9:.0f} GB are free"
            )
        folders = make_models(root, arguments.experts, shapes)
        rows = []
        for method in METHODS:
            command = ours_command(method, folders, root / "out", f"shard_bytes={SHARD_BYTES}")
            rows.append({"method": method} | measured(command, root / "out", method, folders))
        files = len(list(folders[0].glob("*.safetensors")))
    finally:
        shutil.rmtree(root)
    report(rows, arguments, size, files)


def llama(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with its output layer apart from its embedding."""
    rows = {"q": HIDDEN, "k": KEYS, "v": KEYS, "o": HIDDEN}
    block = {f"self_attn.{name}_proj.weight": (size, HIDDEN) for name, size in rows.items()}
    block |= {f"mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
    block |= {"mlp.down_proj.weight": (HIDDEN, INNER)}
    block |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    shapes |= {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_models(root: Path, count: int, shapes: dict[str, tuple[int, ...]]) -> list[Path]:
    """A base, and experts that are the base plus small noise."""
    import torch

    from twinbench.merging.compress import generator
    from twinbench.weights.state_dict import StateDict, read_checkpoint
    from twinbench.weights.write import write_checkpoint

    entries = {name: ("BF16", shape) for name, shape in shapes.items()}

    def noise(scale: float, who: str, name: str) -> torch.Tensor:
        return torch.randn(shapes[name], generator=generator(0, who, name)).mul_(scale)

    folders = [root / "base", *(root / f"expert{number}" for number in range(count))]
    made = StateDict(shapes, lambda name: noise(0.02, "base", name).bfloat16())
    write_checkpoint(folders[0], made, entries, shard_bytes=SHARD_BYTES, metadata={})
    base = read_checkpoint(folders[0])
    for folder in folders[1:]:
        made = StateDict(shapes, lambda name, who=folder.name: noise(1e-3, who, name).add_(base[name]).bfloat16())
        write_checkpoint(folder, made, entries, shard_bytes=SHARD_BYTES, metadata={})
    return folders


def report(rows: list[dict], arguments: argparse.Namespace, size: int, files: int) -> None:
    """Print the table, and keep it where it is a full-size run."""
    import psutil

    from twinbench.records.provenance import versions
    from twinbench.system.device import machine

    where = f"{machine()}, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    lines = [
        f"# Merging {arguments.experts} sharded experts of {size / 2e9:.1f} billion parameters, disk to disk\n",
        f"{where}; {', '.join(' '.join(item) for item in versions().items())}; {datetime.now(UTC):%Y-%m-%d}.\n",
        f"Random bfloat16 in Llama's shapes, {size / 1e9:.1f} GB in {files} files each. Whole processes, run once. "
        f"Bar: {BAR / 1e9:.0f} GB of anonymous memory, whatever the models' size.\n",
        "| method | wall, s | after imports, s | peak anonymous memory, GB | within the bar |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        cells = [row["method"], f"{row['wall_s']:.1f}", f"{row['work_s']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {'yes' if row['peak_bytes'] <= BAR else 'NO'} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.layers == LAYERS:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "sharded.md").write_text(table, encoding="utf-8")
        found = {"date": datetime.now(UTC).isoformat(), "machine": where, "versions": versions(), "bar_bytes": BAR}
        found |= {"experts": arguments.experts, "bytes_each": size, "files_each": files, "rows": rows}
        (RESULTS / "sharded.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
