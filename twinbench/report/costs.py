"""What the rows of a block cost: bytes, data and settings tried, seconds, and what a search on held-out rows costs."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from twinbench.records.seconds import parts, spent
from twinbench.report.blocks import Block, Column, Row, Run
from twinbench.report.held_out import Settings

RATE = "s per 1000 rows"
QUIET = 0.05  # of all cores: what other processes may use while a run is timed


def search(block: Block, table: pd.DataFrame) -> pd.DataFrame:
    """Of each method on held-out rows: its best setting, the average of that and of its worst, and what choosing cost.

    Best method first. Empty for a block on test rows, which choose nothing. The minutes are those of all its settings:
    to merge, to train routers, to route and to score, as far as they were measured.
    """
    methods = {row.label: row.method for row in block.rows}
    minutes = {
        row.label: sum(np.nansum(np.array(_seconds(run)[:4], float)) / 60 for run in row.runs) for row in block.rows
    }
    ranked = table[(table["role"] == "") & table["average"].notna() & (block.split == "validation")]
    lines = [
        {"method": method, "best setting": own["method"].iloc[0], "average": own["average"].iloc[0]}
        | {"worst setting's average": own["average"].iloc[-1], "settings tried": len(own)}
        | {"minutes": sum(minutes[label] for label in own["method"])}
        for method, own in ranked.groupby(ranked["method"].map(methods), sort=False)
    ]
    return pd.DataFrame(lines)


def storage(rows: list[Row], held_out: Mapping[str, Settings], counted: list[Column]) -> pd.DataFrame:
    """Bytes per part and in total, mean over seeds, how the exclusive parts are stored, and what the row cost in data.

    How they are stored is there where a record says it; a row whose records are older has no word there.

    Args:
        held_out: per method of the rows what held-out rows have scored.
        counted: the columns that a setting's place goes by.
    """
    parts = ["shared", "exclusive", "router"]
    lines = []
    for row in rows:
        first = [run.records[0] for run in row.runs]
        sizes = {part: round(np.mean([record[f"{part}_bytes"] for record in first])) for part in parts}
        kinds = dict.fromkeys(kind for record in first if (kind := record["exclusive_kind"]))
        stored = {"exclusive stored as": ", ".join(kinds) or None, "data needs": first[0]["reads"]}
        settings = held_out[row.method]
        stored |= {"settings tried": settings.tried, "place in the largest search": settings.place(row, counted)}
        lines.append({"method": row.label} | sizes | {"total": sum(sizes.values())} | stored)
    told = ["exclusive stored as"] if any(line["exclusive stored as"] for line in lines) else []
    columns = ["method", *parts, "total", *told, "data needs", "settings tried", "place in the largest search"]
    return pd.DataFrame(lines, columns=columns)


def time(rows: list[Row]) -> pd.DataFrame:
    """Seconds to merge, to train the router, to route all tasks and to score them, and the last two per 1,000 rows.

    Means over the seeds that ran on a quiet machine; a row without one is left out. NaN where not measured.
    """
    names = ["merge", "router training", "route", "evaluation", RATE]
    lines = []
    for row in rows:
        quiet = [_seconds(run) for run in row.runs if _is_quiet(run)]
        if quiet:
            means = np.array(quiet, dtype=float).mean(axis=0).tolist()
            lines.append({"method": row.label} | dict(zip(names, means, strict=True)))
    return pd.DataFrame(lines, columns=["method", *names])


def _is_quiet(run: Run) -> bool:
    """Whether it is known that other processes left the machine to the run; older records do not say."""
    return all(record["others_share"] is not None and record["others_share"] <= QUIET for record in run.records)


def _seconds(run: Run) -> list[float | None]:
    """Merge, router training, route, evaluation, the last two per 1,000 rows."""
    merge, training, route, evaluation = spent(run.records)
    scoring, n = [route, evaluation], [part["n"] for part in parts(run.records)]
    rate = 1000 * np.sum(scoring, dtype=float) / np.sum(n, dtype=float)  # None becomes NaN, and so does its sum
    return [merge, training, route, evaluation, rate]
