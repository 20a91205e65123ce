"""What a run took, and what a planned one will take by the records of runs like it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from twinbench.records.record import Record

if TYPE_CHECKING:
    from twinbench.plan.job import Job

Spent = tuple[float | None, float | None, float | None, float | None]


def parts(rows: Sequence[Record]) -> list[Record]:
    """One row of each task and split: the metrics of a part share its times and its number of rows."""
    return list({(row["task"], row["split"]): row for row in rows}.values())


def spent(rows: Sequence[Record]) -> Spent:
    """Seconds to merge, to train the router, to route all tasks and to score them; None where not measured.

    Args:
        rows: of one run.
    """
    route, evaluation = ([part[key] for part in parts(rows)] for key in ("route_seconds", "eval_seconds"))
    return rows[0]["merge_seconds"], rows[0]["router_seconds"], _sum(route), _sum(evaluation)


def expected(rows: Iterable[Record], job: "Job") -> float | None:
    """The median time of the runs on the job's rows that are most like it, in seconds.

    Most alike are runs of its very settings, then those of its method and router, then those of its method, then all.
    The training of experts is not in it. A run that found in memory what an earlier one of its sweep had made took less
    than it would alone.

    Args:
        rows: of all runs.

    Returns:
        None if no run of this suite_id, split and precision was timed.
    """
    runs: dict[tuple, list[Record]] = {}
    for row in rows:
        if row["status"] == "ok" and (row["suite_id"], row["precision"]) == (job.suite_id, job.precision):
            runs.setdefault((row["run_id"], row["time"]), []).append(row)
    timed = []
    for found in runs.values():
        took = _sum(spent(found))
        if took is not None and any(row["primary"] and row["split"] == job.split for row in found):
            timed.append((found[0], took))
    likeness: list[Callable[[Mapping], object]] = [
        lambda run: (run["method"], run["params"], run["router"]),
        lambda run: (run["method"], run["router"] and run["router"]["name"]),
        lambda run: run["method"],
        lambda _: None,
    ]
    wanted = {"method": job.method, "params": job.params, "router": job.router}
    for key in likeness:
        alike = [took for run, took in timed if key(run) == key(wanted)]
        if alike:
            return median(alike)
    return None


def words(seconds: float) -> str:
    """A time as a person would say it: "40 s", "12 min" or "3 h 20 min"."""
    whole, minutes = round(seconds), round(round(seconds) / 60)
    if whole <= 90:
        return f"{whole} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _sum(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else float(sum(values))
