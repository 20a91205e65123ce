"""Is it the sentence encoder? The paper's router on three bases' hidden states, and the rows that tasks share.

    TWINBENCH_DATA=FOLDER PYTHONPATH=. .venv/bin/python tests/studies/router_bases.py

The router of conf/router/mlp.yaml reads mean-pooled states of the unmerged base: MiniLM-L6 and MPNet-base were trained
to embed sentences, SmolLM2-135M was not. Which of GLUE's eight tasks does a row come from? Writes
results/studies/router_bases.md and .json.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import AutoModel

from twinbench import prepare
from twinbench.assets.sources import fetch
from twinbench.records.provenance import versions
from twinbench.routing.features import hidden_states
from twinbench.suite import Suite, Task
from twinbench.system.device import machine
from twinbench.weights.pretrained import open_pretrained
from twinbench.workbench import Workbench, autocast

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "studies"
TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
BASES = {"minilm": "sentences", "mpnet": "sentences", "smollm": "next tokens"}  # and what each learned last
LAYERS = (3, None)  # None: the last
ROWS = 1000  # of each task: training rows for the router, and the first of the test
HELD_OUT = 300  # rows of each task that choose the router's epoch
SEEDS = (0, 1, 2)


def conf(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / f"{name}.yaml"))


def read(base: str) -> tuple[dict[str, Task], Path]:
    """GLUE's tasks, and the folder of a base."""
    source = conf(f"asset/{base}")
    tasks = {name: conf(f"task/{name}") for name in TASKS}
    suite = {"workload": "classification", "base": source, "tasks": tasks, "limit": ROWS}
    return prepare.read(suite), fetch(source)


def features(base: str, tasks: dict[str, Task], folder: Path) -> dict:
    """Per layer and split the features (n, hidden) of all tasks beside each other, and the task of each row (n,)."""
    workload = prepare.workload({"workload": "classification"})
    tokenizer = workload.open_tokenizer(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    bench = Workbench(Suite(base, folder, {}, {}, {}, tasks, tokenizer, workload), "cpu", 32, 10**10, "bfloat16")
    bench.module = autocast(open_pretrained(AutoModel, folder, dtype=torch.float32).eval(), torch.bfloat16)
    found = {}
    for layer in LAYERS:
        for split in ("train", "validation", "test"):
            rows = HELD_OUT if split == "validation" else ROWS
            parts = [hidden_states(bench, task, split, layer=layer, pool="mean", rows=rows) for task in tasks]
            which = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
            found[layer, split] = torch.cat(parts), which
    return found


def accuracies(found: dict, layer: int | None) -> list[float]:
    """Per task the share of test rows whose largest weight is on it, the mean over seeds."""
    states, which = found[layer, "test"]
    model, each = instantiate(conf("router/mlp")["model"]), []
    for seed in SEEDS:
        router = model.fit(found[layer, "train"], found[layer, "validation"], seed).eval()
        with torch.inference_mode():
            right = router.logits(states).argmax(1) == which
        each.append([right[which == task].float().mean().item() for task in range(len(TASKS))])
    return np.mean(each, 0).tolist()


def shared_rows(tasks: dict[str, Task]) -> list[tuple[str, str, int, int]]:
    """(task, other task, n, of) where n of the task's scored rows are among the other's training rows."""

    def texts(task: Task, split: str) -> list[frozenset]:
        rows = zip(*(task.splits[split][column] for column in task.columns), strict=True)
        return [frozenset(re.sub("[^a-z0-9]", "", text.lower()) for text in row) for row in rows]

    trained = {name: set(texts(task, "train")) for name, task in tasks.items()}
    found = []
    for name, task in tasks.items():
        scored = texts(task, "test")
        counts = {other: sum(row in trained[other] for row in scored) for other in tasks}
        found += [(name, other, count, len(scored)) for other, count in counts.items() if count]
    return found


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    lines, numbers = [], {}
    for base, learned in tqdm(BASES.items(), unit="base"):
        tasks, folder = read(base)
        found = features(base, tasks, folder)
        for layer in LAYERS:
            each = accuracies(found, layer)
            numbers[f"{base}, {'last' if layer is None else layer}"] = dict(zip(TASKS, each, strict=True))
            cells = [f"{100 * value:.1f}" for value in (*each, np.mean(each))]
            lines.append([base, learned, "last" if layer is None else str(layer), *cells])
    rows = shared_rows(tasks)
    (RESULTS / "router_bases.json").write_text(
        json.dumps({"machine": machine(), "versions": versions(), "accuracy": numbers, "shared": rows}, indent=1) + "\n"
    )
    table = ["| base | learned last | layer | " + " | ".join(TASKS) + " | mean |", "| --- | --- | --- |" + " --: |" * 9]
    table += ["| " + " | ".join(line) + " |" for line in lines]
    shared = ["| scored rows of | are training rows of | how many | of |", "| --- | --- | --: | --: |"]
    shared += [f"| {task} | {other} | {count} | {of} |" for task, other, count, of in rows]
    text = f"""# Is it the sentence encoder that a router fails on?

Accuracy in % of the paper's router (`router=mlp`) on the first {ROWS:,} rows of each GLUE test: which task is a row of?
It reads the mean of the unmerged base's hidden states. It is trained on {ROWS:,} training rows of each task, with
{len(SEEDS)} seeds. Forward passes are in bfloat16.

{chr(10).join(table)}

## Rows that tasks share

Rows whose texts are, case and punctuation aside, also among the training rows of a task.

{chr(10).join(shared)}

Made by `tests/studies/router_bases.py` on {machine()}.
"""
    (RESULTS / "router_bases.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
