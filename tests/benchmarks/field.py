"""Every static method that reads weights alone, disk to disk: seconds and memory, and three of them by FusionBench.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/field.py [--experts 8] [--size base] [--no-peers] [--only pcb sce]

Makes experts of RoBERTa-base's size (random float32), merges them in processes of their own at each method's defaults,
and writes results/benchmarks/field.md and .json. A process that needs more memory than there is counts as failed.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from merge import PEERS, RESULTS, SIZES, environment, make_models, measured
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf" / "method"
CHANGED = {"wudi": ["method.solver=closed"]}  # its other solver takes 300 steps of Adam on every matrix
ON = {"lines": "task_arithmetic", "svc": "task_arithmetic"}  # the static method that each modifies
FOR_LORA = ("knots",)  # it factors all experts' matrices side by side, which takes hours where they have full rank
PEER_METHODS = {
    "tsv_m": ("TaskSingularVectorMerging", {}),
    "iso_c": ("IsotropicMergingInCommonSubspace", {"scaling_factor": 1.0}),
    "wudi": ("WUDIMerging", {"iter_num": 3}),  # of the 300 steps that are its default
}
FUSION_BENCH = """
import json, sys, time, typing
start = time.perf_counter()
import typing_extensions
typing.override = typing_extensions.override  # which it expects of a newer Python
import fusion_bench.method as methods
from fusion_bench.modelpool import BaseModelPool
from transformers import AutoModel
imported = time.perf_counter()
class Pool(BaseModelPool):
    def load_model(self, name, *args, **kwargs):
        return AutoModel.from_pretrained(self._models[name], add_pooling_layer=False)
base, *experts = json.loads(sys.argv[1])
pool = Pool({"_pretrained_": base, **{f"expert{i}": e for i, e in enumerate(experts)}})
algorithm = getattr(methods, sys.argv[3])(**json.loads(sys.argv[4]))
algorithm.run(pool).save_pretrained(sys.argv[2])
print(json.dumps({"imports": imported - start, "work": time.perf_counter() - imported}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure them, too")
    parser.add_argument("--only", nargs="+", choices=static(), help="measure these, and keep the last run's other rows")
    arguments = parser.parse_args()
    python = environment("fusion-bench", PEERS["fusion-bench"]) if arguments.peers else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that gigabytes are removed then, too
    root = Path(tempfile.mkdtemp(prefix="twinbench-field-"))
    rows = {row["method"]: row for row in last(arguments)} if arguments.only else {}
    where = machine_and_packages(arguments.peers)
    try:
        folders = make_models(root, arguments.experts, arguments.size)
        size = (folders[0] / "model.safetensors").stat().st_size
        for method in arguments.only or static():
            row = {"method": method, "date": datetime.now(UTC).isoformat(), "machine": where, "ours": None}
            before = rows.get(method, {})
            row["peer"] = before.get("peer") if before.get("machine") == where else None
            if method not in FOR_LORA:
                row["ours"] = once(ours(method, folders, root / "out"), root, method, folders)
            if python and method in PEER_METHODS:
                row["peer"] = once(theirs(method, python, folders, root / "out"), root, method, folders)
            rows[method] = row
            save(rows, arguments, size)
    finally:
        shutil.rmtree(root)
    report(rows, arguments, size)


def machine_and_packages(peers: bool) -> str:
    import psutil

    from twinbench.records.provenance import versions
    from twinbench.system.device import machine

    packages = versions() | ({"fusion-bench": PEERS["fusion-bench"]} if peers else {})
    memory = psutil.virtual_memory().total / 2**30
    return f"{machine()}, {memory:.0f} GiB; {', '.join(' '.join(item) for item in packages.items())}"


def last(arguments: argparse.Namespace) -> list[dict]:
    """The last run's rows."""
    file = RESULTS / "field.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if (found.get("size"), found.get("experts")) != (arguments.size, arguments.experts):
        sys.exit("error: --only adds to a run of the same models, and there is none")
    return found["rows"]


def static() -> list[str]:
    """The methods that `twinbench.merge` takes."""
    from twinbench.plan.signature import signature

    def plain(path: Path) -> bool:
        takes = signature(OmegaConf.load(path)["_target_"])
        return not takes.route and takes.reads == "nothing" and path.stem not in ("expert", "pretrained")

    return sorted(path.stem for path in CONF.glob("*.yaml") if plain(path))


def ours(method: str, folders: list[Path], out: Path) -> list[str]:
    base, *experts = folders
    given = [f"method={method}", f"base={base}", f"out={out}", *CHANGED.get(method, [])]
    given += [f"method@shared={ON[method]}"] if method in ON else []
    given += [f"experts={{{', '.join(f'{folder.name}: {folder}' for folder in experts)}}}"]
    return [sys.executable, "-m", "twinbench.merge", *given]


def theirs(method: str, python: Path, folders: list[Path], out: Path) -> list[str]:
    name, values = PEER_METHODS[method]
    return [str(python), "-c", FUSION_BENCH, json.dumps([*map(str, folders)]), str(out), name, json.dumps(values)]


def once(command: list[str], root: Path, method: str, folders: list[Path]) -> dict:
    """The run's figures, or in their place why the process failed or was killed."""
    try:
        return measured(command, root / "out", method, folders)
    except RuntimeError as error:
        why = str(error).splitlines()[-1]
        print(f"{method} failed: {why}", flush=True)
        shutil.rmtree(root / "out", ignore_errors=True)
        return {"failed": why}


def save(rows: dict[str, dict], arguments: argparse.Namespace, size: int) -> None:
    """Keep what was measured so far: the whole run takes twenty minutes."""
    if arguments.size == "base":
        RESULTS.mkdir(parents=True, exist_ok=True)
        found = {"experts": arguments.experts, "size": arguments.size, "bytes_each": size}
        found["rows"] = [rows[method] for method in sorted(rows)]
        (RESULTS / "field.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def report(rows: dict[str, dict], arguments: argparse.Namespace, size: int) -> None:
    """Print the table, and keep it where it is a full-size run."""
    failed = {method: row["peer"]["failed"] for method, row in rows.items() if "failed" in (row["peer"] or {})}
    wheres = sorted({f"{row['machine']}; {row['date'][:10]}" for row in rows.values()})
    lines = [
        f"# Every static method that reads weights alone, on {arguments.experts} experts, disk to disk\n",
        *(f"{where}.\n" for where in wheres),
        f"RoBERTa-{arguments.size} in float32, {size / 1e6:.0f} MB each. Whole processes at each method's defaults, "
        "one run each; `wudi` with its closed solver. Memory is anonymous memory at its peak, in MiB and in sizes of "
        "the result. FusionBench's WUDI was given 3 of its 300 steps. A dash: not run; `knots` is for LoRA experts.\n",
        *(f"FusionBench's `{name}` failed: {why}\n" for name, why in failed.items()),
        "| method | wall, s | after imports, s | memory, MiB | memory / result | FusionBench: wall, s | × ours | MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for _, row in sorted(rows.items()):
        own, peer = row["ours"], row["peer"]
        cells = ["failed" if own else "–"] * 4
        if own and "failed" not in own:
            cells = [f"{own['wall_s']:.1f}", f"{own['work_s']:.1f}", f"{own['peak_bytes'] / 2**20:.0f}"]
            cells += [f"{own['peak_bytes'] / size:.1f}"]
        beside = ["failed" if peer else "–"] * 3
        if peer and "failed" not in peer:
            beside = [f"{peer['wall_s']:.1f}", "–", f"{peer['peak_bytes'] / 2**20:.0f}"]
            if own and "failed" not in own:
                beside[1] = f"{peer['wall_s'] / own['wall_s']:.1f}"
        cells += beside
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.size == "base":
        (RESULTS / "field.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
