"""A sweep over a suite of RoBERTa-base's size: does memory stay within the workbench's budget?

    PYTHONPATH=. .venv/bin/python tests/benchmarks/sweep.py [--experts 8] [--layers 12]

Makes an MPNet of 110 million weights and its experts (random), runs `individual`, average, TIES and Twin-Merging on
them by one `run.py -m`, watches the anonymous memory of that process, and writes results/benchmarks/sweep.md and .json.
It needs 5 GB of disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from merge import RESULTS
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MPNetConfig, MPNetForSequenceClassification, PreTrainedTokenizerFast

METHODS = "individual,average,ties,twin_merging"
BAR = 8 * 10**9  # bytes of anonymous memory
WORDS, ROWS = 30527, 64
SPLITS = {"train": "train", "test": "test"}
ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="twinbench-sweep-"))
    try:
        weights = make_suite(root, arguments.experts, arguments.layers)
        peak, seconds = measured(root)
        budget = json.loads((root / "budget.json").read_text())
    finally:
        shutil.rmtree(root)
    report(arguments, weights, peak, seconds, budget)


def make_suite(root: Path, experts: int, layers: int) -> int:
    """Write the base, the experts, their rows and the suite's file; the number of weights of one model."""
    torch.manual_seed(0)
    config = MPNetConfig(vocab_size=WORDS, num_hidden_layers=layers)
    base = MPNetForSequenceClassification(config)
    save(base, root / "base")
    words, draw, tasks = [f"w{i}" for i in range(5, WORDS)], np.random.default_rng(0), {}
    for number in range(experts):
        name = f"task{number}"
        expert = MPNetForSequenceClassification(config)
        with torch.no_grad():
            for own, origin in zip(expert.parameters(), base.parameters(), strict=True):
                own.mul_(0.05).add_(origin)
        save(expert, root / "experts" / name)
        (root / "data" / name).mkdir(parents=True)
        for split in ("train", "test"):
            texts = [" ".join(draw.choice(words[number::experts], 12)) for _ in range(2 * ROWS)]
            frame = pd.DataFrame({"text": texts, "label": draw.integers(0, 2, 2 * ROWS)})
            frame.to_parquet(root / "data" / name / f"{split}.parquet")
        tasks[name] = {
            "sources": {"folder": {"path": str(root / "data" / name)}},
            **{"columns": ["text"], "classes": ["a", "b"], "metrics": ["accuracy"], "max_length": 32},
            "rows": {"train": ROWS, "validation": ROWS, "test": ROWS},
            "data": {
                "_target_": "twinbench.tasks.parquet.columns",
                "_partial_": True,
                "train": "train",
                "test": "test",
            },
        }
    suite = {
        **{"defaults": [{"/workload@_here_": "classification"}], "name": "large", "tasks": tasks},
        "base": {"path": str(root / "base")},
        "checkpoints": {name: {"path": str(root / "experts" / name)} for name in tasks},
    }
    (root / "conf" / "suite").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(suite), root / "conf" / "suite" / "large.yaml")
    return sum(parameter.numel() for parameter in base.parameters())


def save(model: torch.nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    vocabulary = {word: at for at, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}
    vocabulary |= {f"w{i}": i for i in range(5, WORDS)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    given = {"pad_token": "<pad>", "unk_token": "<unk>", "model_input_names": ["input_ids", "attention_mask"]}
    PreTrainedTokenizerFast(tokenizer_object=fast, **given).save_pretrained(folder)


def measured(root: Path) -> tuple[int, float]:
    """Peak of the sweep's anonymous memory in bytes, and its seconds."""
    command = [sys.executable, "run.py", "-m", f"hydra.searchpath=[file://{root / 'conf'}]", "suite=large"]
    command += [f"method={METHODS}", f"results_dir={root / 'results'}", "wandb.mode=disabled", "router.model.epochs=5"]
    environment = {**os.environ, "TWINBENCH_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines() if status.exists() else []
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))])
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"error: the sweep ended with {process.returncode}")
    from twinbench.system.memory import budget

    (root / "budget.json").write_text(json.dumps(budget(None)))
    return peak, time.perf_counter() - start


def report(arguments: argparse.Namespace, weights: int, peak: int, seconds: float, budget: int) -> None:
    row = {"experts": arguments.experts, "weights": weights, "methods": METHODS, "peak_bytes": peak}
    row |= {"budget_bytes": budget, "seconds": seconds, "bar_bytes": BAR, "within": peak <= BAR}
    text = f"""# Memory of a sweep

`PYTHONPATH=. .venv/bin/python tests/benchmarks/sweep.py`, {datetime.now(UTC):%Y-%m-%d}: {METHODS.replace(",", ", ")}
in one process, on {arguments.experts} random experts of {weights:,} weights each (float32).

| | bytes |
| --- | ---: |
| peak of anonymous memory | {peak:,} |
| what the workbench may remember (a quarter of the memory) | {budget:,} |
| bar | {BAR:,} |

The sweep took {seconds:.0f} s.
"""
    (RESULTS / "sweep.json").write_text(json.dumps(row, indent=1) + "\n")
    (RESULTS / "sweep.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
