"""The tables of results/README.md on the field: each method tuned and at its defaults, and the published order."""

from functools import cache

import pandas as pd

from support.commands import ROOT
from support.reports import REPORTS, markdown, table
from twinbench.records import store
from twinbench.report import blocks, read

NAME, STORED, TIME = (f"strict_bfloat16_{name}" for name in ("normalized", "storage", "time"))
BOUNDS = "individual", "pretrained"
ROUTES = {"layer": "its own, in each layer", "task": "told the task"}
TRAINED = {"train": "on all training rows", "validation": "on a router's rows"}  # multitask's


@cache
def rows(report: str) -> pd.DataFrame:
    """The rows of a report, best first: scores, bytes, data needs; their method, route, and whether they are tuned.

    The rows of ``experiment=NAME_tuned`` are tuned: held-out rows chose their settings.
    """
    results = REPORTS.parent
    (block,) = (
        block
        for block in blocks.blocks(read.chosen(store.latest(store.read(results)), results, report, None))
        if block.protocol == "strict" and not block.adapted and block.split == "test"
    )
    heads = {row.label: row.runs[0].records[0] for row in block.rows}
    found = table(report, NAME).join(table(report, STORED)[["total", "data needs"]])
    records = [heads[label] for label in found.index]
    found["name"] = [record["method"] for record in records]
    found["route"] = [_way(record) for record in records]
    found["tuned"] = [record["experiment"].endswith("_tuned") for record in records]
    return found


def compared(report: str) -> tuple[str, list[str]]:
    """Per method and route the tuned row, with the average of the row at defaults; the best tuned row first."""
    lines = []
    for (method, route), own in rows(report).groupby(["name", "route"], sort=False):
        chosen, plain = (own[own["tuned"] == tuned] for tuned in (True, False))
        assert len(chosen) < 2 and len(plain) < 2, own.index
        best = (chosen if len(chosen) else plain).iloc[0]
        default = plain.iloc[0] if len(plain) else best
        named = f"`{method}`" + (f", `{route}`" if route else "")
        cells = [f"{best.average:.1f} ({best.average_low:.1f} to {best.average_high:.1f})"]
        cells += [f"{default.average:.1f}", f"{best.corrected:.1f}", f"{best.worst:.1f} {best.worst_task}"]
        lines.append((best.average, [named, *cells, f"{best.total / 1e6:.0f}", best["data needs"]]))
    heads = ["method, route", "tuned", "default", "chance-corrected", "worst task", "MB", "data needs"]
    return markdown(heads, [cells for _, cells in sorted(lines, key=lambda line: -line[0])]), []


def order(report: str) -> tuple[str, list[str]]:
    """Spearman's rank correlation of our tuned static methods with each source's own, of the ones that both have."""
    literature = pd.read_csv(ROOT / "results/literature/glue.csv")
    theirs = literature[(literature["task"] == "average") & (literature["unit"] == "normalized %")]
    ours = rows(report)
    ours = ours[(ours["data needs"] == "nothing") & (ours["route"] == "")].sort_values("tuned", ascending=False)
    best = ours.groupby("name", sort=False)["average"].first().drop(list(BOUNDS), errors="ignore")
    lines = []
    for source, own in theirs.groupby("source", sort=False):
        both = own.set_index("method")["value"].groupby(level=0).first().to_frame("theirs").join(best, how="inner")
        if len(both) > 3:
            names = ", ".join(f"`{name}`" for name in both.sort_values("theirs", ascending=False).index)
            lines.append([source, names, f"{len(both)}", f"{both['theirs'].rank().corr(both['average'].rank()):.2f}"])
    return markdown(["source", "its order, best first", "methods", "Spearman with ours"], lines), []


def _way(record: dict) -> str:
    """Who tells a method the task, or what `multitask` was trained on."""
    trained = TRAINED.get(record["params"].get("split"), "")
    return (record["router"] or {}).get("name") or ROUTES.get(record["route"], trained)
