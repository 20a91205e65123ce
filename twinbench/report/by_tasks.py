"""How scores fall with the number of merged tasks, where an experiment merged subsets of one suite's tasks."""

from collections.abc import Iterator, Mapping

import pandas as pd
from matplotlib.figure import Figure

from twinbench.protocol import PROTOCOLS
from twinbench.report import plots
from twinbench.report.blocks import Block
from twinbench.report.section import Section

TITLE = "Average normalized score by the number of tasks"
SLUG = "tasks"


def sections(scored: list[tuple[Block, pd.DataFrame]], name: str, marks: plots.Styles) -> Iterator[Section]:
    """A section per suite and way of scoring whose blocks have different numbers of tasks.

    Args:
        scored: each block with its normalized table.
        name: of the report.
    """
    groups: dict[tuple, list[tuple[Block, pd.DataFrame]]] = {}
    for block, scores in scored:
        kind = block.suite, block.protocol, block.split, block.precision, block.adapted
        groups.setdefault(kind, []).append((block, scores))
    for (suite, protocol, split, precision, adapted), group in groups.items():
        found = points(group)
        if found["tasks"].nunique() < 2:
            continue
        parts = [suite, protocol] + [part for part in (split, precision) if part not in ("test", "float32")]
        parts += ["adapted"] if adapted else []
        methods = {row.label: row.method for block, _ in group for row in block.rows}
        words = f"{suite}: by the number of tasks"
        section = Section(
            words, PROTOCOLS[protocol].sentence, "_".join([SLUG, *parts]), False, {SLUG: table(found)}, [], {}
        )
        picture = plots.render(_draw(found, methods, marks, f"{name}, {protocol}."), section.file(SLUG))
        section.figures[SLUG] = picture
        yield section


def points(group: list[tuple[Block, pd.DataFrame]]) -> pd.DataFrame:
    """The averages of one way of scoring, by the number of tasks: the best method first.

    Returns:
        Columns method, tasks (their number), average (over the subsets of that many tasks that have one), average_low
        and average_high (of the lowest and the highest subset). Methods of two numbers or more.
    """
    lines = []
    for block, scores in group:
        count = len({task for task, _ in block.columns})
        for method, average in zip(scores["method"], scores["average"], strict=True):
            lines.append({"method": method, "tasks": count, "average": average})
    found = pd.DataFrame(lines, columns=["method", "tasks", "average"]).dropna()
    grouped = found.groupby(["method", "tasks"], sort=False)["average"]
    whole = grouped.agg(average="mean", average_low="min", average_high="max").reset_index()
    whole = whole[whole.groupby("method")["tasks"].transform("nunique") > 1].sort_values("tasks")
    order = list(whole.groupby("method")["average"].mean().sort_values(ascending=False).index)
    return whole.set_index("method").loc[order].reset_index()


def table(found: pd.DataFrame) -> pd.DataFrame:
    """The same with a row per method: for each number of tasks its average, and of several subsets the ends."""
    wide = pd.DataFrame({"method": list(dict.fromkeys(found["method"]))})
    for count, rows in found.groupby("tasks"):
        rows = rows.set_index("method").reindex(wide["method"])
        several = (rows["average_low"] < rows["average_high"]).to_numpy()
        wide[f"{count} tasks"] = rows["average"].to_numpy()
        for end in ("low", "high"):
            wide[f"{count} tasks_{end}"] = rows[f"average_{end}"].where(several).to_numpy()
    return wide


def _draw(found: pd.DataFrame, methods: Mapping[str, str], marks: plots.Styles, where: str) -> Figure:
    curve = found.rename(columns={"method": "curve", "tasks": "value"})
    note = f"{where} Mean over the subsets of that many tasks; shaded: from the lowest to the highest."
    return plots.curves(curve, "number of tasks", [], methods, marks, TITLE, note)
