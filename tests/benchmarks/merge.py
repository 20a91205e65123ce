"""Merging disk to disk, against the floor of reading and writing the same bytes and against peers from PyPI.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/merge.py [--experts 8] [--size base] [--no-peers]

Makes experts of RoBERTa-base's size (random float32), merges them in processes of their own, and writes
results/benchmarks/merge.md and .json. mergekit and fusion-bench are installed into environments in the cache folder.
"""

import argparse
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parents[2] / "results" / "benchmarks"
SIZES = {
    "base": {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    "tiny": {"vocab_size": 2000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}
SETTINGS = {
    "average": {},
    "task_arithmetic": {"scaling": 0.3},
    "ties": {"density": 0.2, "scaling": 1.0, "scope": "global", "aggregate": "mean"},
    "dare": {"density": 0.3, "scaling": 0.3, "seed": 0},
}
REPEATS = 3  # medians are given; what a peer takes most of a minute for runs once
PEERS = {"mergekit": "0.1.5", "fusion-bench": "0.2.33"}
PEER_RUNS = (
    *(("mergekit", method) for method in ("average", "task_arithmetic", "dare", "ties")),
    *(("fusion-bench", method) for method in ("average", "task_arithmetic")),
)
SLOW = ("ties", "dare")
NOT_RUN = "fusion-bench's TIES is not run: on this work it needs more than 22 GB of memory and is killed."
BLOCK = 1 << 24
MERGEKIT = """
import json, sys, time
start = time.perf_counter()
from mergekit.scripts.run_yaml import main
imported = time.perf_counter()
main([sys.argv[1], sys.argv[2]], standalone_mode=False)
print(json.dumps({"imports": imported - start, "work": time.perf_counter() - imported}))
"""
FUSION_BENCH = """
import json, sys, time, typing
start = time.perf_counter()
import typing_extensions
typing.override = typing_extensions.override  # which it expects of a newer Python
from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from fusion_bench.modelpool import BaseModelPool
from transformers import AutoModelForSequenceClassification
imported = time.perf_counter()
class Pool(BaseModelPool):
    def load_model(self, name, *args, **kwargs):
        return AutoModelForSequenceClassification.from_pretrained(self._models[name])
base, *experts = json.loads(sys.argv[1])
average = sys.argv[3] == "average"
pool = Pool({**({} if average else {"_pretrained_": base}), **{f"expert{i}": e for i, e in enumerate(experts)}})
algorithm = SimpleAverageAlgorithm() if average else TaskArithmeticAlgorithm(scaling_factor=0.3)
algorithm.run(pool).save_pretrained(sys.argv[2])
print(json.dumps({"imports": imported - start, "work": time.perf_counter() - imported}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure them, too")
    arguments = parser.parse_args()
    pythons = {name: environment(name, version) for name, version in PEERS.items()} if arguments.peers else {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that gigabytes are removed then, too
    root = Path(tempfile.mkdtemp(prefix="twinbench-merge-"))
    try:
        folders = make_models(root, arguments.experts, arguments.size)
        ways = {("floor: read and write", "floor"): lambda: floor_command(folders, root / "out")}
        ways |= {("twinbench", m): lambda m=m: ours_command(m, folders, root / "out") for m in SETTINGS}
        for name, method in PEER_RUNS if pythons else ():
            make = partial(peer_command, name, method, pythons[name], folders, root)
            ways[f"{name} {PEERS[name]}", method] = make
        rows = interleaved(ways, root / "out", folders)
        size = (folders[0] / "model.safetensors").stat().st_size
    finally:
        shutil.rmtree(root)
    report(rows, arguments, size)


def make_models(root: Path, count: int, size: str) -> list[Path]:
    """A base and its experts, the base plus small noise, as sequence classifiers that every tool can load."""
    import torch
    from transformers import AutoModelForSequenceClassification, RobertaConfig

    from twinbench.merging.compress import generator
    from twinbench.system.files import new_folder
    from twinbench.weights.state_dict import StateDict
    from twinbench.weights.write import write_weights

    config = RobertaConfig(**SIZES[size], num_labels=2, architectures=["RobertaForSequenceClassification"])
    config.dtype = "float32"
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def noise(scale: float, *key: str) -> torch.Tensor:
        return scale * torch.randn(shapes[key[-1]], generator=generator(0, *key))

    folders = [root / "base", *(root / f"expert{number}" for number in range(count))]
    for folder in folders:
        difference = 0.0 if folder.name == "base" else 1e-3
        state = StateDict(
            shapes,
            lambda name, folder=folder, difference=difference: (
                noise(0.02, "base", name) + (noise(difference, folder.name, name) if difference else 0.0)
            ),
        )
        with new_folder(folder) as part:
            entries = {name: ("F32", shape) for name, shape in shapes.items()}
            write_weights(part, state, entries, shard_bytes=1 << 40, metadata={})
            config.save_pretrained(part)
    return folders


def interleaved(ways: dict[tuple[str, str], Callable], out: Path, folders: list[Path]) -> list[dict]:
    """Measure every way several times in turns, so that a slow minute of the machine is everybody's."""
    found = {way: [] for way in ways}
    for turn in range(REPEATS):
        for (tool, method), command in ways.items():
            slow = tool.partition(" ")[0] in PEERS and method in SLOW
            if not (slow and turn):
                found[tool, method].append(measured(command(), out, method, folders))
    rows = []
    for (tool, method), runs in found.items():
        middle = {key: median(run[key] for run in runs) for key in ("wall_s", "work_s")}
        rows.append({"tool": tool, "method": method, **middle, "peak_bytes": max(run["peak_bytes"] for run in runs)})
        rows[-1]["runs"] = [[run["wall_s"], run["work_s"]] for run in runs]
    return rows


def floor_command(folders: list[Path], out: Path) -> list[str]:
    return [sys.executable, __file__, "floor", str(out), *map(str, folders)]


def ours_command(method: str, folders: list[Path], out: Path, *more: str) -> list[str]:
    """What a user types."""
    base, *experts = folders
    given = [f"method={method}", f"base={base}", f"out={out}", *more]
    given += [f"experts={{{', '.join(f'{folder.name}: {folder}' for folder in experts)}}}"]
    given += [f"{'seed' if key == 'seed' else f'method.{key}'}={value}" for key, value in SETTINGS[method].items()]
    return [sys.executable, "-m", "twinbench.merge", *given]


def peer_command(name: str, method: str, python: Path, folders: list[Path], root: Path) -> list[str]:
    """The same work by a peer."""
    base, *experts = map(str, folders)
    if name == "mergekit":
        config = root / "mergekit.yaml"
        config.write_text(json.dumps(mergekit_config(method, base, experts)))  # JSON is YAML
        return [str(python), "-c", MERGEKIT, str(config), str(root / "out")]
    return [str(python), "-c", FUSION_BENCH, json.dumps([base, *experts]), str(root / "out"), method]


def mergekit_config(method: str, base: str, experts: list[str]) -> dict:
    """The same merge in mergekit's words; its TIES trims tensor by tensor."""
    if method == "average":
        models = [{"model": expert, "parameters": {"weight": 1.0}} for expert in experts]
        return {"merge_method": "linear", "models": models, "dtype": "float32"}
    given = {
        "task_arithmetic": {"weight": 0.3},
        "ties": {"weight": 1.0, "density": SETTINGS["ties"]["density"]},
        "dare": {"weight": 0.3, "density": SETTINGS["dare"]["density"]},
    }[method]
    return {
        "merge_method": "dare_linear" if method == "dare" else method,
        "base_model": base,
        "models": [{"model": expert, "parameters": given} for expert in experts],
        "parameters": {"normalize": method == "ties"},
        "dtype": "float32",
    }


def measured(command: list[str], out: Path, method: str, folders: list[Path]) -> dict:
    """Run a process that says its seconds in its last line: its wall time, that after imports, its peak memory."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        os.sync()  # what earlier work left to be written is none of this one's
        environ = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=said, stderr=errors, env=environ)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.01)
        wall = time.perf_counter() - start
        said.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{method}: {command[0]} ended with {process.returncode}:\n{errors.read()[-3000:]}")
        last = said.read().splitlines()[-1]
        work = json.loads(last)["work"] if last.startswith("{") else float(last.split()[-2])  # ours ends in "... s"
    check(method, out, folders)
    shutil.rmtree(out)
    print(f"{method}: {wall:.2f} s, {work:.2f} s after imports, {peak / 2**20:.0f} MiB", flush=True)
    return {"wall_s": wall, "work_s": work, "peak_bytes": peak}


def anonymous(pid: int) -> int:
    """Bytes of a process that are not a mapped file's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def check(method: str, out: Path, folders: list[Path]) -> None:
    """Whoever did the work, an average and Task Arithmetic must be just that."""
    if method not in ("average", "task_arithmetic"):
        return
    import torch

    from twinbench.weights.state_dict import read_checkpoint

    written = read_checkpoint(out)
    name = next(name for name in written if ".1." in name and name.endswith("weight") and written[name].dim() == 2)
    base, *experts = (read_checkpoint(folder)[name].double() for folder in folders)
    exact = sum(experts) / len(experts)
    if method == "task_arithmetic":
        exact = base + SETTINGS[method]["scaling"] * sum(expert - base for expert in experts)
    error = (written[name].double() - exact).abs().max().item()
    rounding = torch.finfo(written[name].dtype).eps * exact.abs().max().item()
    if error > 1e-6 + rounding:
        raise RuntimeError(f"{method}: {name} is off by {error:.1e}")


def floor(out: Path, folders: list[Path]) -> None:
    """Read every byte of the inputs through memory maps, and meanwhile write and sync as many as a result has."""
    import torch

    from twinbench.system.files import new_folder  # noqa: F401 (ours imports it, too)
    from twinbench.weights.state_dict import PIECE, concurrently

    imported = time.perf_counter()

    def read(path: Path) -> None:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            for piece in torch.frombuffer(mapped, dtype=torch.float32, count=len(mapped) // 4).split(PIECE):
                piece.sum()

    def write(path: Path) -> None:
        left, zeros = inputs[0].stat().st_size, memoryview(bytes(BLOCK))
        with path.open("wb") as file:
            while left > 0:
                left -= file.write(zeros[:left])
            file.flush()
            os.fsync(file.fileno())

    out.mkdir()
    inputs = [folder / "model.safetensors" for folder in folders]
    output = out / "model.safetensors"
    concurrently(lambda path: write(path) if path == output else read(path), [output, *inputs])
    print(json.dumps({"work": time.perf_counter() - imported}))


def environment(name: str, version: str) -> Path:
    """The Python of a virtual environment with a peer in it, made once."""
    from importlib.metadata import version as installed

    from twinbench.assets.sources import cache_dir

    folder = cache_dir() / "benchmarks" / f"{name}-{version}"
    done = folder / "installed"
    if not done.exists():
        print(f"installing {name} {version}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        torch = f"torch=={installed('torch').partition('+')[0]}"
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", torch, f"{name}=={version}"]
        subprocess.run(pip, check=True)
        done.touch()
    return folder / "bin" / "python"


def report(rows: list[dict], arguments: argparse.Namespace, size: int) -> None:
    """Print the table, and keep it where it is a full-size run."""
    import psutil

    from twinbench.records.provenance import versions
    from twinbench.system.device import machine

    reference = {row["method"]: row for row in rows if row["tool"] == "twinbench"}
    peers = PEERS if arguments.peers else {}
    where = f"{machine()}, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    packages = versions() | peers
    lines = [
        f"# Merging {arguments.experts} experts, disk to disk\n",
        f"{where}; {', '.join(' '.join(item) for item in packages.items())}; {datetime.now(UTC):%Y-%m-%d}.\n",
        f"RoBERTa-{arguments.size} in float32, {size / 1e6:.0f} MB each, files in the page cache. Whole processes. The "
        f"floor reads every byte of the inputs through memory maps, by all cores, and meanwhile writes and syncs "
        f"as many as a result has. "
        f"Medians of {REPEATS} runs in turns; {' and '.join(SLOW)} of peers once. "
        f"{NOT_RUN if peers else 'Peers were not measured.'}\n",
        "| method | tool | wall, s | × ours | after imports, s | × floor | peak anonymous memory, MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: ["floor", *SETTINGS].index(row["method"])):
        own = reference.get(row["method"])
        cells = [row["method"] if own else "", row["tool"], f"{row['wall_s']:.2f}"]
        cells += [f"{row['wall_s'] / own['wall_s']:.1f}" if own else "", f"{row['work_s']:.2f}"]
        cells += [f"{row['work_s'] / rows[0]['work_s']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.size == "base":
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "merge.md").write_text(table, encoding="utf-8")
        found = {"date": datetime.now(UTC).isoformat(), "machine": where, "versions": packages}
        found |= {"experts": arguments.experts, "size": arguments.size, "bytes_each": size, "rows": rows}
        (RESULTS / "merge.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["floor"]:
        floor(Path(sys.argv[2]), list(map(Path, sys.argv[3:])))
    else:
        main()
