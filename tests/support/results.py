"""Records and predictions of a toy suite, written by hand, and what a report computes from them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from twinbench.records import store
from twinbench.report import blocks, bootstrap, held_out, living, read, tables
from twinbench.report.notes import notes as explained
from twinbench.tasks.metrics import score

TASKS = {"topic": "accuracy", "mood": "pearson"}


N = 300


def truth() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {"topic": generator.integers(0, 4, N).astype(float), "mood": generator.normal(size=N)}


def guess(quality: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Predictions that are right (topic) or correlate (mood) the more, the nearer ``quality`` is to 1."""
    generator, labels = np.random.default_rng(seed), truth()
    wrong = generator.random(N) > quality
    noise = generator.normal(size=N)
    return {
        "topic": np.where(wrong, (labels["topic"] + 1) % 4, labels["topic"]),
        "mood": quality * labels["mood"] + np.sqrt(1 - quality**2) * noise,
    }


def add_run(results: Path, run_id: str, method: str, predictions: dict | None = None, **fields) -> dict:
    """Write the records and predictions of one run and return its fields; without predictions it is a failed one."""
    run = {"run_id": run_id, "time": "2026-01-01T00:00:00+00:00", "commit": "abc", "dirty": False, "status": "ok"}
    run |= {"error": None, "experiment": None, "suite": "toy", "suite_id": "new", "base": "mini", "method": method}
    run |= {"params": {}, "router": None, "protocol": "strict", "seed": None, "split": "test", "device": "cpu"}
    run |= {"merge_seconds": 1.5, "router_seconds": 4.0, "route_seconds": 0.5, "eval_seconds": 2.0, "others_share": 0.0}
    run |= {"shared_bytes": 1_000_001}
    run |= {"exclusive_bytes": 500_000, "router_bytes": 7, "peak_memory_bytes": 1, "versions": {"numpy": "2"}} | fields
    rows, frames = [], []
    for task, prediction in (predictions or {}).items():
        value = score(TASKS[task], truth()[task], prediction)
        row = {"task": task, "metric": TASKS[task], "primary": True, "value": value, "n": N}
        rows.append(run | row)
        if (run["router"] or {}).get("name") == "mlp":
            shares = {"router_accuracy": 0.9} | {f"routed_to/{name}": 0.9 if name == task else 0.1 for name in TASKS}
            rows += [run | row | {"metric": name, "primary": False, "value": part} for name, part in shares.items()]
        frame = {
            "task": task,
            "split": run["split"],
            "row": np.arange(N),
            "label": truth()[task],
            "prediction": prediction,
        }
        frames.append(pd.DataFrame(frame))
    if predictions is None:
        rows = [run | dict.fromkeys(("task", "metric", "primary", "value", "n")) | {"status": "failed"}]
    for folder in ("records", "predictions"):
        (results / folder).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (results / "records" / f"{run_id}.jsonl").write_text(text, encoding="utf-8")
    if frames:
        pd.concat(frames).to_parquet(results / "predictions" / f"{run_id}.parquet")
    return run


def fill(tmp_path: Path) -> Path:
    """Bounds, two static methods, Twin-Merging over three seeds and with an oracle, blind runs and a failed one."""
    mlp, oracle = {"name": "mlp", "hidden": 8}, {"name": "oracle"}
    add_run(tmp_path, "a0", "individual", guess(0.95), router=oracle)
    add_run(tmp_path, "a1", "pretrained", guess(0.2))
    add_run(tmp_path, "a2", "average", guess(0.5))
    add_run(tmp_path, "a3", "ties", guess(0.6), params={"density": 0.2})
    for seed, quality in enumerate((0.85, 0.9, 0.92)):
        add_run(tmp_path, f"b{seed}", "twin_merging", guess(quality, seed), router=mlp, seed=seed)
    add_run(tmp_path, "b3", "twin_merging", guess(0.93), router=oracle, seed=0)
    add_run(tmp_path, "c0", "individual", guess(0.9), router=mlp, protocol="blind", seed=0)
    add_run(tmp_path, "c1", "twin_merging", guess(0.8), router=mlp, protocol="blind", seed=0)
    add_run(tmp_path, "d0", "della", error="ValueError: density must be in (0, 1]; got 0\n  traceback")
    for name in TASKS:
        other = guess(0.3) | {name: guess(0.95)[name]}
        add_run(tmp_path, f"e-{name}", "expert", other, params={"task": name})
    return tmp_path


def computed(results: Path, reference: str = "twin_merging") -> dict[tuple[str, str], dict[str, pd.DataFrame]]:
    """Tables per (suite_id, protocol), without writing or drawing anything."""
    rows = store.latest(store.read(results))
    found = blocks.blocks(read.chosen(rows, results, "toy", None))
    frames, _ = read.predictions(results, found)
    draws, constants = bootstrap.draws(frames, found)
    return {
        (block.suite_id, block.protocol): tables.make(
            block, draws, reference, constants.get((block.suite_id, block.split)), held_out.settings(rows)
        )
        for block in found
        if not block.adapted
    }


def table(results: Path, name: str = "normalized", reference: str = "twin_merging") -> pd.DataFrame:
    """A table of the strict block of the newest experts, by label."""
    found = computed(results, reference)["new", "strict"][name]
    return found.set_index("expert" if name == "experts" else "method")


def notes(results: Path) -> str:
    """What is said of the empty cells of the first block."""
    block, *_ = blocks.blocks(read.chosen(store.latest(store.read(results)), results, "toy", None))
    frames, doubts = read.predictions(results, [block])
    draws, constants = bootstrap.draws(frames, [block])
    experts = living.checked(block, draws, constants.get((block.suite_id, block.split)))
    table = tables.normalized(block, draws, "ties", experts)
    dead = living.dead({"living": experts.table} if len(experts.table) else {})
    return "\n".join(explained(block, table, "ties", dead=dead, doubts=doubts, where="results_dir=R"))


def raw(predictions: dict[str, np.ndarray]) -> dict[str, float]:
    return {task: score(TASKS[task], truth()[task], predictions[task]) for task in TASKS}
