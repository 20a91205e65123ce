"""What a report is made of: the records and predictions of its runs, read and checked, so that no number is made up.

Predictions that do not give the score of their record are left out.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from twinbench.records import store
from twinbench.report.blocks import Block, Run
from twinbench.report.bootstrap import statistic
from twinbench.system.mistakes import Mistake

if TYPE_CHECKING:
    import pandas as pd

TRAINING = ("rows", "recipe", "curve", "loss", "metric", "seconds", "device", "data")  # what is told of an expert
RECIPE = ("epochs", "lr", "batch_size", "weight_decay", "warmup", "seed")
ROUNDING = 1e-6  # of a score that is computed again


def chosen(rows: list[dict], results_dir: Path, suite: str | None, experiment: str | None) -> list[dict]:
    """The records of a suite's runs on the test split, or of the runs of an experiment's last sweep.

    Of a suite whose test was never scored they are those on its held-out rows.

    Args:
        rows: of all runs, as ``records.store.latest`` gives them.

    Raises:
        ValueError: there are none.
    """
    mine = belonging(rows, results_dir, suite, experiment)
    if experiment and not mine:
        store.sweep(results_dir, experiment)  # which says so where there was none
        raise Mistake(f"no records of experiment {experiment!r} in {results_dir}: its last sweep has no result")
    if not mine:
        known = ", ".join(sorted({row["suite"] or "unknown" for row in rows})) or "none"
        raise Mistake(f"no records of suite {suite!r}; suites with records: {known}")
    whole = suite or any(row["suite"] == experiment for row in mine)
    other = {row["run_id"] for row in mine if row["split"] == "validation"} if whole else set()
    return [row for row in mine if row["run_id"] not in other] or mine


def belonging(rows: list[dict], results_dir: Path, suite: str | None, experiment: str | None) -> list[dict]:
    """The records of a suite, or of the runs of an experiment's last sweep.

    Where an experiment has the name of a suite, either name gives the suite's records, and those runs of the experiment
    that had been measured under another suite's name. The suite's name leaves out runs with other experts.
    """
    name = suite or experiment
    own = [row for row in rows if row["suite"] == name]
    if suite and not own:
        return []
    listed = set(store.sweep(results_dir, name)) if name in store.sweeps(results_dir) else set()
    experts = {row["suite_id"] for row in (own if suite else rows)}
    return [row for row in rows if row["suite"] == name or (row["run_id"] in listed and row["suite_id"] in experts)]


def predictions(results_dir: Path, found: Iterable[Block]) -> "tuple[dict[str, pd.DataFrame], dict[str, list[str]]]":
    """The predictions of the runs in ``found`` that kept them, on their block's split.

    Returns:
        Per run_id the predictions of those tasks whose recorded score they give; and per run_id why others are left
        out.

    Raises:
        ValueError: a file is no table of predictions, or not the one that its record was written with.
    """
    kept, doubts = {}, {}
    for block in found:
        for run in (run for row in block.rows for run in row.runs):
            frame = store.predictions(results_dir, run.run_id)
            if frame is not None:
                frame = frame[(frame["split"] == block.split).to_numpy(dtype=bool)]
                wrong = _contradictions(run, frame)
                kept[run.run_id] = frame[~frame["task"].isin(wrong).to_numpy(dtype=bool)]
                doubts[run.run_id] = list(wrong.values())
    return kept, doubts


def _contradictions(run: Run, frame: "pd.DataFrame") -> dict[str, str]:
    """Per task whose predictions are not those of the run's record, what they say and what the record says."""
    parts = dict(list(frame.groupby("task", sort=False)))
    n = {record["task"]: record["n"] for record in run.records if record["primary"]}
    found = {}
    for (task, metric), value in run.scores.items():
        part = parts.get(task, frame[:0])
        if n[task] is not None and n[task] != len(part):
            found[task] = f"{len(part)} rows of {task}, the record {n[task]}"
        elif len(part):
            labels, given = (part[name].to_numpy(dtype=float) for name in ("label", "prediction"))
            rule = statistic(metric, labels)
            score = rule(np.ones((len(part), 1)), labels, given[None])[0, 0] if rule else value
            if not np.isfinite(given).all():
                found[task] = f"predictions of {task} that are no numbers"
            elif abs(score - value) > ROUNDING:
                found[task] = f"{task} {metric} {score:.4f}, the record {value:.4f}"
    return found


def experts(results_dir: Path, suite_id: str) -> dict[str, dict]:
    """How the experts of a suite were trained, by task; empty where that is not known.

    Raises:
        ValueError: the file is broken, or lacks what a report tells of a task.
    """
    training = store.experts(results_dir, suite_id) or {}
    for task, said in training.items():
        found = said if isinstance(said, dict) else {}
        recipe = found.get("recipe")
        absent = [key for key in TRAINING if key not in found]
        absent += [key for key in RECIPE if key not in (recipe if isinstance(recipe, dict) else {})]
        if absent:
            raise Mistake(f"{results_dir / 'experts' / suite_id}.json: task {task} lacks {', '.join(absent)}")
    return training
