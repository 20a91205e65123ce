"""What a truncated SVD leaves out of the exclusive parts, and what that costs: experiment=shared_expert, taken apart.

    TWINBENCH_DATA=FOLDER PYTHONPATH=. .venv/bin/python tests/studies/tail_energy.py

Tail energy is the part of |expert - shared|² beyond a rank, over all matrices of all experts, in % of |expert - base|²,
so that shared experts can be compared. Functional loss is what the normalized average lacks to 100, from the records of
the experiment. Run that first: its experts are read from the cache. Writes results/studies/tail_energy.md and .json.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tqdm import tqdm

from baselines import average, task_arithmetic
from twinbench import prepare
from twinbench.plan.suite import narrowed
from twinbench.records import store
from twinbench.suite import Suite

ROOT = Path(__file__).parents[2]
REFERENCE, RESULTS = ROOT / "results" / "reference", ROOT / "results" / "studies"
SUITES = {"shared_short": "short and hard", "shared_long": "long and gently"}
SHARED = ("pretrained", "average", "task_arithmetic")
RATIOS = (0.003, 0.006, 0.011, 0.021, 0.042, 0.1)


def opened(name: str) -> Suite:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        suite = narrowed(OmegaConf.to_container(compose("config", [f"suite={name}"]), resolve=True)["suite"])
    return prepare.opened(suite, "cpu")


def shared_experts(suite: Suite) -> dict:
    scaling = OmegaConf.load(ROOT / "conf/method/task_arithmetic.yaml").scaling
    return {
        "pretrained": suite.base,
        "average": average.merge(suite.base, suite.experts).shared,
        "task_arithmetic": task_arithmetic.merge(suite.base, suite.experts, scaling=scaling).shared,
    }


def tail_energies(suite: Suite, shared) -> dict[float, float]:
    """Per rank ratio what is left out of the exclusive parts' energy, in parts of the energy of ``expert - base``."""
    whole, left = 0.0, defaultdict(float)
    for expert in tqdm(suite.experts.values(), unit="expert", leave=False):
        for name in suite.base:
            delta = (expert[name].float() - shared[name].float()).double()
            if delta.dim() == 2:
                whole += (expert[name].double() - suite.base[name].double()).square().sum().item()
            if delta.dim() == 2 and delta.any():
                gram = delta @ delta.T if delta.shape[0] < delta.shape[1] else delta.T @ delta
                energies = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
                for ratio in RATIOS:
                    left[ratio] += energies[max(1, int(ratio * min(delta.shape))) :].sum().item()
    return {ratio: energy / whole for ratio, energy in left.items()}


def losses(suite: str) -> dict[tuple[str, float], float]:
    """Per (shared expert, rank ratio) 100 - the normalized average of all tasks, from the records of the experiment."""
    rows = [row for row in store.latest(store.read(REFERENCE)) if row["suite"] == suite and row["primary"]]
    newest = max(rows, key=lambda row: row["time"])["suite_id"]
    rows = [row for row in rows if row["suite_id"] == newest and row["split"] == "test"]
    best = {row["task"]: row["value"] for row in rows if row["method"] == "individual"}
    found = defaultdict(list)
    for row in rows:
        if row["method"] == "twin_merging":
            key = row["params"]["shared"]["method"], row["params"]["rank_ratio"]
            found[key].append(100 * row["value"] / best[row["task"]])
    return {key: 100 - float(np.mean(scores)) for key, scores in found.items()}


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    lines, tail = [], {}
    for name, how in SUITES.items():
        suite, lost = opened(name), losses(name)
        tails = {kind: tail_energies(suite, shared) for kind, shared in shared_experts(suite).items()}
        tail[name] = {kind: {str(ratio): 100 * share for ratio, share in of.items()} for kind, of in tails.items()}
        for ratio in RATIOS:
            cells = [f"{100 * tails[kind][ratio]:.1f}" for kind in SHARED]
            cells += [f"{lost[kind, ratio]:.1f}" for kind in SHARED]
            lines.append([how, str(max(1, int(ratio * 384))), *cells])
    heads = ["experts trained", "rank", *(f"tail, {kind}" for kind in SHARED), *(f"loss, {kind}" for kind in SHARED)]
    table = ["| " + " | ".join(heads) + " |", "| --- |" + " --: |" * (len(heads) - 1)]
    table += ["| " + " | ".join(line) + " |" for line in lines]
    text = f"""# What truncation leaves out, and what it costs

Tail: the energy of `expert - shared` beyond a rank, over all matrices of all four experts, in % of the energy of
`expert - base`. Loss: what the normalized average lacks to 100 (points), with the known task. The columns differ in the
shared expert.

{chr(10).join(table)}

Made by `tests/studies/tail_energy.py` from the records of `experiment=shared_expert` and the experts in the cache.
"""
    (RESULTS / "tail_energy.md").write_text(text)
    (RESULTS / "tail_energy.json").write_text(json.dumps(tail, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
