"""What a report is made of: the records and predictions of its runs, read and checked, so that no number is made up.

A record that lacks a key or a number is refused. Predictions that do not give the score of their record are left out.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from twinbench import records
from twinbench.report.blocks import PROTOCOLS, Block, Run
from twinbench.report.intervals import statistic

if TYPE_CHECKING:
    import pandas as pd

NUMBER, NONE = (float, int), (type(None),)
EVERY = {  # what any record holds: key -> types of its value, as JSON gives them
    **dict.fromkeys(("time", "status", "method", "protocol"), (str,)),
    **dict.fromkeys(("suite", "suite_id", "base", "split", "error", "commit", "device"), (str, *NONE)),
    **dict.fromkeys(("params", "router", "versions"), (dict, *NONE)),
    **{"seed": (int, *NONE), "dirty": (bool, *NONE), "primary": (bool, *NONE)},
}
MEASURED = {  # what those of a finished run hold
    **{"task": (str,), "split": (str,), "metric": (str,), "primary": (bool,), "value": NUMBER},
    **dict.fromkeys(("merge_seconds", "route_seconds", "eval_seconds"), (*NUMBER, *NONE)),
    **dict.fromkeys(("shared_bytes", "exclusive_bytes", "router_bytes"), NUMBER),
}
LATER = {  # what older ones may lack
    **{"n": (int, *NONE), "router_seconds": (*NUMBER, *NONE)},
    **dict.fromkeys(("data", "exclusive_kind"), (str, *NONE)),
}
WORDS = {str: "text", dict: "an object", bool: "true or false", int: "a whole number", float: "a finite number"}
CHOICES = {"status": ("ok", "failed"), "protocol": PROTOCOLS}
PREDICTED = ("row", "label", "prediction")  # columns of numbers
ROUNDING = 1e-6  # of a score that is computed again


def chosen(results_dir: Path, suite: str | None, experiment: str | None) -> list[dict]:
    """The records of a suite's runs on the test split, or of the runs of an experiment's last sweep.

    Raises:
        ValueError: there are none, or a record is malformed.
    """
    rows = records.read(results_dir)
    for row in rows:
        _check(row, results_dir)
    rows = records.latest(rows)
    if experiment:
        run_ids = set(records.sweep(results_dir, experiment))
        mine = [row for row in rows if row["run_id"] in run_ids]
        if not mine:
            raise ValueError(f"no records of experiment {experiment!r} in {results_dir}: its last sweep has no result")
        return mine
    mine = [row for row in rows if row["suite"] == suite]
    other = {row["run_id"] for row in mine if row["split"] == "validation"}
    if not mine:
        known = ", ".join(sorted({row["suite"] or "unknown" for row in rows})) or "none"
        raise ValueError(f"no records of suite {suite!r}; suites with records: {known}")
    return [row for row in mine if row["run_id"] not in other]


def _check(row: Mapping, results_dir: Path) -> None:
    """Refuse a record that lacks a key, or holds a value of another type or a number that is not finite."""
    kinds = EVERY | MEASURED | LATER if row.get("status") == "ok" else EVERY
    wrong = next((key for key, types in kinds.items() if not _legal(row, key, types)), None)
    if wrong:
        words = [WORDS.get(kind, "null") for kind in kinds[wrong] if kind is not int or float not in kinds[wrong]]
        got = f"got {row[wrong]!r}" if wrong in row else "there is none"
        wanted = " or ".join(CHOICES.get(wrong, words))
        raise ValueError(f"{_file(results_dir, row['run_id'])}: {wrong} of a record must be {wanted}; {got}")
    if row["router"] is not None and not isinstance(row["router"].get("name"), str):
        raise ValueError(
            f"{_file(results_dir, row['run_id'])}: router of a record must have a name; got {row['router']}"
        )


def _legal(row: Mapping, key: str, types: tuple[type, ...]) -> bool:
    if key not in row:
        return key in LATER
    value = row[key]
    finite = type(value) is not float or math.isfinite(value)
    return type(value) in types and finite and value in CHOICES.get(key, (value,))


def _file(results_dir: Path, run_id: object) -> str:
    """The file of a run's records, the newest if there are several; a malformed record may stand in any other."""
    paths = [path for path in (results_dir / "records").iterdir() if path.stem.endswith(str(run_id))]
    return str(max(paths)) if paths else f"{results_dir / 'records'}, run {run_id}"


def predictions(results_dir: Path, found: Iterable[Block]) -> "tuple[dict[str, pd.DataFrame], dict[str, list[str]]]":
    """The predictions of the runs in ``found`` that kept them, on their block's split.

    Returns:
        Per run_id the predictions of those tasks whose recorded score they give; and per run_id why others are left
        out.

    Raises:
        ValueError: a file is no table of predictions.
    """
    kept, doubts = {}, {}
    for block in found:
        for run in (run for row in block.rows for run in row.runs):
            frame = _frame(results_dir, run.run_id)
            if frame is not None:
                frame = frame[(frame["split"] == block.split).to_numpy(dtype=bool)]
                wrong = _contradictions(run, frame)
                kept[run.run_id] = frame[~frame["task"].isin(wrong).to_numpy(dtype=bool)]
                doubts[run.run_id] = list(wrong.values())
    return kept, doubts


def _frame(results_dir: Path, run_id: str) -> "pd.DataFrame | None":
    path = results_dir / "predictions" / f"{run_id}.parquet"
    try:
        frame = records.predictions(results_dir, run_id)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not predictions ({' '.join(str(error).split())})") from error
    if frame is None:
        return None
    wrong = [name for name in ("task", *PREDICTED) if name not in frame]
    wrong += [name for name in PREDICTED if name in frame and frame[name].dtype.kind not in "iufb"]
    if wrong:
        raise ValueError(f"{path}: not predictions, for want of {', '.join(wrong)} (numbers, and task as text)")
    return frame


def _contradictions(run: Run, frame: "pd.DataFrame") -> dict[str, str]:
    """Per task whose predictions are not those of the run's record, what they say and what the record says."""
    parts = dict(list(frame.groupby("task", sort=False)))
    n = {record["task"]: record.get("n") for record in run.records if record["primary"]}
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
