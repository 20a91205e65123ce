"""How long a planned run will take, by the records of runs like it."""

from collections.abc import Iterable, Mapping
from statistics import median
from typing import TYPE_CHECKING

from twinbench.records.record import Record

if TYPE_CHECKING:
    from twinbench.plan.job import Job

WHOLE, EACH = ("merge_seconds", "router_seconds"), ("route_seconds", "eval_seconds")  # of a run, and of each task


def seconds(rows: Iterable[Record], job: "Job") -> float | None:
    """The median time of the runs on the job's rows that are most like it: merge, router, routes and scores.

    Most alike are those of its method and router, then those of its method, then all. The training of experts is not in
    it. A run that found in memory what an earlier one of its sweep had made took less than it would alone.

    Args:
        rows: of all runs.

    Returns:
        None if no run on the same rows, with the same experts' recipe and precision, was timed.
    """
    runs: dict[tuple, list[Record]] = {}
    for row in rows:
        if row["status"] == "ok" and all(row[key] == getattr(job, key) for key in ("suite_id", "split", "precision")):
            runs.setdefault((row["run_id"], row["time"]), []).append(row)
    timed = [(found[0], took) for found in runs.values() if (took := _took(found)) is not None]
    same = [(row, took) for row, took in timed if row["method"] == job.method]
    twins = [(row, took) for row, took in same if _router(row["router"]) == _router(job.router)]
    return median(took for _, took in twins or same or timed) if timed else None


def _took(rows: list[Record]) -> float | None:
    parts = {row["task"]: row for row in rows}.values()
    found = [rows[0][key] for key in WHOLE] + [part[key] for part in parts for key in EACH]
    return None if any(value is None for value in found) else sum(found)


def _router(router: Mapping | None) -> str | None:
    return router["name"] if router else None


def told(seconds: float) -> str:
    """A time as a person would say it: "40 s", "12 min" or "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
