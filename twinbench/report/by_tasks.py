"""How scores fall with the number of merged tasks, where an experiment merged subsets of one suite's tasks."""

from collections.abc import Iterator, Mapping

import pandas as pd
from matplotlib.figure import Figure

from twinbench.protocol import PROTOCOLS
from twinbench.report import plots
from twinbench.report.blocks import Block, Row
from twinbench.report.section import Section

TITLE = "Average normalized score by the number of tasks"
SLUG = "tasks"


def sections(scored: list[tuple[Block, pd.DataFrame]], name: str, marks: plots.Styles) -> Iterator[Section]:
    """A section per suite and way of scoring whose blocks have different numbers of tasks.

    Blocks that score some of their merged tasks are left out: their average is over other tasks than their number says.

    Args:
        scored: each block with its normalized table.
        name: of the report.
    """
    groups: dict[tuple, list[tuple[Block, pd.DataFrame]]] = {}
    for block, scores in scored:
        if any(record["unscored"] for row in block.rows for run in row.runs for record in run.records):
            continue
        kind = block.suite, block.protocol, block.split, block.precision, block.adapted
        groups.setdefault(kind, []).append((block, scores))
    for (suite, protocol, split, precision, adapted), group in groups.items():
        found = points(group)
        if found["tasks"].nunique() < 2:
            continue
        parts = [suite, protocol] + [part for part in (split, precision) if part not in ("test", "float32")]
        parts += ["adapted"] if adapted else []
        methods = {name: row.method for block, _ in group for name, row in _named(block, group)}
        words, sentence = f"{suite}: by the number of tasks", PROTOCOLS[protocol].sentence
        made, notes = {SLUG: table(found)}, _differing(group, set(found["method"]))
        section = Section(words, sentence, "_".join([SLUG, *parts]), False, made, notes, {})
        picture = _draw(found, methods, marks, f"{name}, {protocol}.")
        section.figures[SLUG] = plots.render(picture, section.file(SLUG))
        yield section


def points(group: list[tuple[Block, pd.DataFrame]]) -> pd.DataFrame:
    """The averages of one way of scoring, by the number of tasks: the best method first.

    Returns:
        Columns method (the row's name in its own table), tasks (their number), average (over the subsets of that many
        tasks), average_low and average_high (of the lowest and the highest subset). Names of two numbers or more. What
        is told the task in one place and not in another has two names. Where a method lacks a subset that others have,
        it has no average of that many tasks: the subsets are not alike.
    """
    lines = []
    for block, scores in group:
        averages = scores.set_index("method")["average"]
        for name, row in _named(block, group):
            lines.append({"method": name, "tasks": _count(block), "average": averages[row.label]})
    found = pd.DataFrame(lines, columns=["method", "tasks", "average"]).dropna()
    grouped = found.groupby(["method", "tasks"], sort=False)["average"]
    whole = grouped.agg(subsets="count", average="mean", average_low="min", average_high="max").reset_index()
    whole = whole[whole["subsets"] == whole.groupby("tasks")["subsets"].transform("max")].drop(columns="subsets")
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


def _named(block: Block, group: list[tuple[Block, pd.DataFrame]]) -> Iterator[tuple[str, Row]]:
    """A block's rows, with names under which rows of other blocks may stand beside them."""
    oracle, asked = ({r.label for other, _ in group for r in other.rows if r.oracle is kind} for kind in (True, False))
    for row in block.rows:
        told = row.oracle and row.label in oracle & asked
        yield f"{row.label}, told the task" if told else row.label, row


def _differing(group: list[tuple[Block, pd.DataFrame]], shown: set[str]) -> list[str]:
    """A sentence per name whose settings are not the same everywhere: what they are for which number of tasks."""
    found: dict[str, dict[str, dict[int, None]]] = {}
    for block, _ in sorted(group, key=lambda pair: _count(pair[0])):
        for name, row in _named(block, group):
            if name in shown:
                words = ", ".join(f"{key}={value}" for key, value in row.settings.items())
                found.setdefault(name, {}).setdefault(words, {})[_count(block)] = None
    sentences = []
    for name, ways in found.items():
        if len(ways) > 1:
            each = (f"{words} for {' and '.join(map(str, counts))} tasks" for words, counts in ways.items())
            sentences.append(f"The settings of {name} differ: {'; '.join(each)}.")
    return sentences


def _count(block: Block) -> int:
    return len({task for task, _ in block.columns})


def _draw(found: pd.DataFrame, methods: Mapping[str, str], marks: plots.Styles, where: str) -> Figure:
    curve = found.rename(columns={"method": "curve", "tasks": "value"})
    note = f"{where} Mean over the subsets of that many tasks; shaded: from the lowest to the highest."
    return plots.curves(curve, "number of tasks", [], methods, marks, TITLE, note)
