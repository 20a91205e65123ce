"""Block -> DataFrames at full precision, one unit each. Missing is NaN and is never averaged over."""

import json
from collections.abc import Mapping

import numpy as np
import pandas as pd

from twinbench.records.record import LOWER, ROUTED_TO, ROUTER_ACCURACY, UPPER
from twinbench.report import bootstrap, costs, literature, living, losses, shared_expert, unseen
from twinbench.report.blocks import Block, Column, Row, Run, labels
from twinbench.report.held_out import Settings

ALPHA = 0.05


def make(
    block: Block,
    draws: bootstrap.Draws,
    reference: str,
    constant: Run | None,
    held_out: Mapping[tuple[str, str], Settings],
) -> dict[str, pd.DataFrame]:
    """The block's tables that have lines: normalized, settings, living, raw, storage, time, router, secondary, experts,
    shared, losses, unseen, published, failed.

    Args:
        block: its rows, seeds still apart.
        draws: what ``bootstrap.draws`` gave.
        reference: label or method that differences are taken to.
        constant: the best constant answer to each task, in ``draws`` too; None where none is known.
        held_out: per suite_id and method the settings that were scored on held-out rows.
    """
    found = living.checked(block, draws, constant)
    table = normalized(block, draws, reference, found)
    place = {label: position for position, label in enumerate(table["method"])}
    rows = sorted(block.rows, key=lambda row: place[row.label])
    searches = {row.method: held_out.get((block.suite_id, row.method), Settings()) for row in rows}
    tables = {
        "normalized": table,
        "settings": costs.search(block, table),
        "living": found.table,
        "raw": raw(rows, block.columns, found.living),
        "storage": costs.storage(rows, searches, found.living),
        "time": costs.time(rows),
        "router": router(rows, block.columns, found.living),
        "secondary": secondary(rows),
        "experts": experts(block),
        "shared": shared_expert.shared(block, draws, found.living),
        "losses": losses.losses(block, draws, found.living),
        "unseen": unseen.unseen(block, draws),
        "published": literature.published(block, table),
        "failed": failed(block),
    }
    return {name: table for name, table in tables.items() if len(table)}


def normalized(block: Block, draws: bootstrap.Draws, reference: str, experts: living.Experts) -> pd.DataFrame:
    """Scores in % of the individual expert's, per task, average and worst, against ``reference``; best average first.

    The bounds stand first and last and have no rank. A task whose individual score is 0 or less has no normalized
    score, and a row that lacks a task no average. Averages are over the tasks of living experts. Rows whose averages no
    test tells apart share a tier. ``p`` is corrected for the rows of the table; ``p_least``: it could be no smaller.
    """
    against, bottoms, counted = block.find(reference), normalizers(block), experts.living
    samples = {row.label: bootstrap.averages(row.runs, block.individual, counted, draws) for row in block.rows}
    lines = []
    for row in block.rows:
        line = _normalized_line(row, block.columns, bottoms, counted) | {"reference": row is against}
        lines.append(line | _corrected(row, block, experts, bottoms, draws))
    centre = next((line for line in lines if line["reference"]), {"method": None, "average": np.nan})
    for line in lines:
        line |= _uncertainty(line, centre, samples)
    _correct(lines)
    place = {UPPER: 0, "": 1, LOWER: 2}
    lines.sort(key=lambda line: (place[line["role"]], np.isnan(line["average"]), -line["average"], line["method"]))
    ranked = [line["method"] for line in lines if not line["role"] and not np.isnan(line["average"])]
    ranks = [ranked.index(line["method"]) + 1 if line["method"] in ranked else None for line in lines]
    tasks = [task for task, _ in block.columns]
    spreads = [f"{name}_std" for name in [*tasks, "average"]] if any(line["seeds"] > 1 for line in lines) else []
    columns = ["method", "role", "reference", "seeds", *tasks, "average", "worst", "worst_task"]
    columns += ["average_low", "average_high", "corrected", "corrected_low", "corrected_high"]
    columns += ["difference", "difference_low", "difference_high", "p", "p_least", *spreads]
    table = pd.DataFrame(lines, columns=columns)
    table.insert(0, "rank", pd.Series(ranks, dtype=object))  # whole numbers and None
    tiers = _tiers(ranked, samples)
    table.insert(1, "tier", pd.Series([tiers.get(method) for method in table["method"]], dtype=object))
    return table


def _tiers(ranked: list[str], samples: Mapping[str, np.ndarray | None]) -> dict[str, int]:
    """The tier of each label, best first: a new one begins where a row is significantly below the best of the last."""
    found, tier = {}, 0
    ranked = [label for label in ranked if samples[label] is not None]
    while len(found) < len(ranked):
        best, *rest = [label for label in ranked if label not in found]
        tier += 1
        found[best] = tier
        p = [bootstrap.paired(samples[best], samples[label])[2] for label in rest]
        for label, corrected in zip(rest, bootstrap.holm(np.array(p)), strict=True):
            if corrected < ALPHA:
                break
            found[label] = tier
    return found


def _normalized_line(row: Row, columns: list[Column], bottoms: Mapping[Column, float], counted: list[Column]) -> dict:
    line = {"method": row.label, "role": row.role or "", "seeds": len(row.runs)}
    line |= _cells([run.scores for run in row.runs], {column: column[0] for column in columns}, bottoms, counted)
    whole = not np.isnan(line["average"])
    worst = min((task for task, _ in counted), key=lambda task: line[task]) if whole else None
    return line | {"worst_task": worst, "worst": line[worst] if whole else np.nan}


def _corrected(
    row: Row, block: Block, experts: living.Experts, bottoms: Mapping[Column, float], draws: bootstrap.Draws
) -> dict:
    """The row's average of (score - best constant) / (expert - best constant), in percent, with its interval."""
    floor, counted = experts.constant, experts.living
    if not floor or not counted or any(column not in floor.scores or column not in bottoms for column in counted):
        return {}
    scores = {column: [run.scores.get(column, np.nan) for run in row.runs] for column in counted}
    shares = [(np.mean(scores[c]) - floor.scores[c]) / (bottoms[c] - floor.scores[c]) for c in counted]
    samples = bootstrap.averages(row.runs, block.individual, counted, draws, floor)
    low, high = (np.nan, np.nan) if samples is None else bootstrap.interval(samples)
    return {"corrected": float(100 * np.mean(shares)), "corrected_low": low, "corrected_high": high}


def _correct(lines: list[dict]) -> None:
    """Put Holm's correction in place of each p, and say which could be no smaller."""
    tested = [line for line in lines if "p" in line]
    for line, p in zip(tested, bootstrap.holm(np.array([line["p"] for line in tested])), strict=True):
        line["p"], line["p_least"] = float(p), line["p"] <= bootstrap.FLOOR


def _uncertainty(line: Mapping, centre: Mapping, samples: Mapping[str, np.ndarray | None]) -> dict:
    """Interval of a line's average; its difference to the line ``centre`` with interval and p."""
    mine, base = samples[line["method"]], samples.get(centre["method"])
    found = {}
    if mine is not None:
        found["average_low"], found["average_high"] = bootstrap.interval(mine)
    if line["method"] != centre["method"]:
        found["difference"] = line["average"] - centre["average"]
        if mine is not None and base is not None:
            found["difference_low"], found["difference_high"], found["p"] = bootstrap.paired(mine, base)
    return found


def normalizers(block: Block) -> dict[Column, float]:
    """Per column the individual expert's raw score, only where every individual run has it and it is above 0."""
    found = {}
    for column in block.columns:
        scores = [run.scores.get(column, np.nan) for run in block.individual]
        if scores and np.mean(scores) > 0:
            found[column] = float(np.mean(scores))
    return found


def raw(rows: list[Row], columns: list[Column], counted: list[Column]) -> pd.DataFrame:
    """Primary scores in points (x100), columns headed ``task (metric)``; the average is over those ``counted``."""
    return _points([(row, [run.scores for run in row.runs]) for row in rows], _heads(columns), counted)


def router(rows: list[Row], columns: list[Column], counted: list[Column]) -> pd.DataFrame:
    """Share in % of a task's rows whose largest weight is on its own expert, for the rows that were routed."""
    heads = {(task, ROUTER_ACCURACY): task for task, _ in columns}
    routed = [row for row in rows if any(column in run.others for run in row.runs for column in heads)]
    of_living = [(task, ROUTER_ACCURACY) for task, _ in counted]
    return _points([(row, [run.others for run in row.runs]) for row in routed], heads, of_living)


def _points(rows: list[tuple[Row, list[Mapping]]], heads: Mapping[Column, str], counted: list[Column]) -> pd.DataFrame:
    ones = dict.fromkeys(heads, 1.0)
    lines = [{"method": row.label, "seeds": len(runs)} | _cells(runs, heads, ones, counted) for row, runs in rows]
    names = [*heads.values(), "average"]
    spreads = [f"{name}_std" for name in names] if any(line["seeds"] > 1 for line in lines) else []
    return pd.DataFrame(lines, columns=["method", "seeds", *names, *spreads])


def _heads(columns: list[Column]) -> dict[Column, str]:
    return {(task, metric): f"{task} ({metric})" for task, metric in columns}


def _cells(
    runs: list[Mapping[Column, float]],
    heads: Mapping[Column, str],
    ones: Mapping[Column, float],
    counted: list[Column],
) -> dict:
    """100 x score / one per column, mean over runs, and the average of the columns that are counted.

    ``_std`` (ddof 1) where there are several runs. NaN where a run lacks the column or ``ones`` does; the average is
    NaN too if the column counts.
    """
    count = [column in counted for column in heads]
    names = [*heads.values(), "average"]
    one = np.array([ones.get(column, np.nan) for column in heads])
    scores = np.array([[run.get(column, np.nan) for column in heads] for run in runs])
    means = 100 * (scores.mean(axis=0) / one)
    cells = dict(zip(names, [*means.tolist(), float(np.mean(means[count])) if any(count) else np.nan], strict=True))
    if len(runs) > 1:
        each = 100 * (scores / one)
        each = np.column_stack([each, each[:, count].mean(axis=1)])
        cells |= {f"{name}_std": std for name, std in zip(names, each.std(axis=0, ddof=1).tolist(), strict=True)}
    return cells


def curves(block: Block, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each numeric setting with three or more values among otherwise equal rows: average against value.

    Args:
        table: the block's normalized table.

    Returns:
        Per setting a table with the columns curve (the method, and what else tells the curves apart), value, average,
        average_low and average_high, in the order of curve and value.
    """
    scores = table.set_index("method")[["average", "average_low", "average_high"]].to_dict("index")
    found: dict[str, dict[tuple, list]] = {}
    for row in block.rows:
        for key, value in row.settings.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                rest = {name: other for name, other in row.settings.items() if name != key}
                place = row.method, json.dumps(rest, sort_keys=True)
                found.setdefault(key, {}).setdefault(place, []).append({"value": value} | scores[row.label])
    made = {}
    for key, groups in found.items():
        long = {place: points for place, points in groups.items() if len(points) > 2}
        names = {}
        for method in dict.fromkeys(method for method, _ in long):
            same = [place for place in long if place[0] == method]
            names |= zip(same, labels(method, [json.loads(rest) for _, rest in same]), strict=True)
        lines = [{"curve": names[place]} | point for place, points in long.items() for point in points]
        if lines:
            made[key] = pd.DataFrame(lines).sort_values(["curve", "value"], ignore_index=True)
    return made


def secondary(rows: list[Row]) -> pd.DataFrame:
    """Every metric that is not a task's primary one, raw, one line per (method, task, metric), over the seeds."""
    lines = []
    for row in rows:
        runs = [run.others | run.beside for run in row.runs]
        for task, metric in dict.fromkeys(column for run in runs for column in run):
            values = [run[task, metric] for run in runs if (task, metric) in run]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else np.nan
            line = {"method": row.label, "task": task, "metric": metric, "seeds": len(values)}
            lines.append(line | {"value": float(np.mean(values)), "std": spread})
    return pd.DataFrame(lines, columns=["method", "task", "metric", "seeds", "value", "std"])


def experts(block: Block) -> pd.DataFrame:
    """Raw score in points of each expert (row) on each task (column); the diagonal is an expert on its own task."""
    tasks, heads = [task for task, _ in block.columns], _heads(block.columns)
    rows = {row.settings["task"]: row for row in block.experts}
    names = sorted(rows, key=lambda name: (tasks.index(name) if name in tasks else len(tasks), name))
    table = _points([(rows[name], [run.scores for run in rows[name].runs]) for name in names], heads, list(heads))
    table.insert(0, "expert", names)
    return table[["expert", *heads.values()]]


def confusion(row: Row, columns: list[Column]) -> pd.DataFrame | None:
    """Share in % of each task's rows (row) whose largest weight is on each expert (column); None if not routed."""
    tasks = [task for task, _ in columns]
    routed = dict.fromkeys(metric for run in row.runs for _, metric in run.others if metric.startswith(ROUTED_TO))
    names = [metric.removeprefix(ROUTED_TO) for metric in routed]
    names.sort(key=lambda name: tasks.index(name) if name in tasks else len(tasks))
    shares = [
        [100 * np.mean([run.others.get((task, ROUTED_TO + name), np.nan) for run in row.runs]) for name in names]
        for task in tasks
    ]
    return pd.DataFrame(shares, index=tasks, columns=names) if names else None


def failed(block: Block) -> pd.DataFrame:
    """Runs without a result: label, seed and the first line of the error."""
    lines = [
        {"method": label, "seed": record["seed"], "status": "failed", "error": _first_line(record["error"])}
        for label, record in block.failed
    ]
    return pd.DataFrame(lines, columns=["method", "seed", "status", "error"], dtype=object)


def _first_line(error: str | None) -> str:
    return next((line.strip() for line in (error or "").splitlines() if line.strip()), "no message")
