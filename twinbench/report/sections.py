"""Block -> section: its tables, the notes on them and its figures, under the names that their files carry."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from twinbench.report import plots, tables, text
from twinbench.report.blocks import Block
from twinbench.report.intervals import Draws

TITLES = {
    "scores": "Normalized score by task",
    "averages": "Average normalized score",
    "storage": "Score against storage",
    "router": "Where the router sends each task",
    "experts": "Each expert on each task",
}


def title(name: str) -> str:
    """The title of the figure called ``name``."""
    return TITLES.get(name) or f"Average normalized score by {name.removeprefix('curve_')}"


@dataclass(frozen=True)
class Section:
    """What the report shows of one block; ``figures`` holds the ``svg`` and ``png`` bytes of each."""

    block: Block
    several: bool  # suite_ids in the report, so that the block's own belongs to its name
    older: bool  # of a suite_id that is not the newest of its suite
    tables: dict[str, pd.DataFrame]
    notes: list[str]
    figures: dict[str, dict[str, bytes]]

    def file(self, name: str) -> str:
        """The stem of a table's or figure's files; the expert matrix is plainly ``experts`` where it is strict."""
        split = "" if self.block.split == "test" else f"_{self.block.split}"
        slug = f"{self.block.protocol}{split}" + (f"_{self.block.suite_id}" if self.several else "")
        return name if (name, slug) == ("experts", "strict") else f"{slug}_{name}"


def make(found: list[Block], draws: Draws, name: str, reference: str, *, older: bool) -> list[Section]:
    """One section per block.

    Args:
        name: of the report.
        older: whether suite_ids other than the first block's are older versions, which are not drawn.
    """
    main = found[0].suite_id
    marks = plots.styles((row.method for block in found for row in block.rows), _method(found, reference))
    sections = []
    for block in found:
        other = block.suite_id != main
        made = tables.make(block, draws, reference)
        notes = tables.notes(block, made["normalized"], reference) if "normalized" in made else []
        section = Section(block, other, other and older, made, notes, {})
        drawn = [] if section.older else _draw(section, name, reference, marks)
        figures = {title: plots.render(figure, section.file(title)) for title, figure in drawn}
        sections.append(replace(section, figures=figures))
    return sections


def _method(found: list[Block], reference: str) -> str:
    """The method that ``reference`` (a label or a method) belongs to."""
    return next((row.method for block in found if (row := block.find(reference))), reference)


def _draw(section: Section, name: str, reference: str, marks: plots.Styles) -> Iterator[tuple[str, Figure]]:
    """The section's figures that have something to show, by name."""
    block, made = section.block, section.tables
    where = f"{name}, {text.heading(section)}."
    methods = {row.label: row.method for row in block.rows}
    tasks = [task for task, _ in block.columns]
    table = made.get("normalized", pd.DataFrame({"average": []}))
    if table["average"].notna().any():
        scores = table.set_index("method")[[*tasks, "average", "worst"]]
        share = (scores.to_numpy() / 100).clip(0) ** 2  # squared: most differences lie near the top
        note = f"{where} In % of the individual expert's score; darker is better."
        yield "scores", plots.heat(scores, share, TITLES["scores"], note, apart=2)
        note = f"{where} Lines: 95 % bootstrap intervals over test examples; dashed: individual and pretrained."
        yield "averages", plots.averages(table, methods, marks, TITLES["averages"], note)
        for key, curve in tables.curves(block, table).items():
            methods_of = {name: name.partition(" (")[0] for name in curve["curve"]}
            bounds = table.loc[table["role"] != "", "average"]
            note = f"{where} Shaded: 95 % bootstrap intervals over {block.split} examples; dashed: the bounds."
            yield f"curve_{key}", plots.curves(curve, key, bounds, methods_of, marks, title(f"curve_{key}"), note)
        points = table.merge(made["storage"], on="method").dropna(subset="average")
        note = f"{where} Up is better, left is smaller."
        yield "storage", plots.storage(points, methods, marks, TITLES["storage"], note)
    row = block.find(reference)
    shares = row and tables.confusion(row, block.columns)
    if shares is not None:
        note = f"{where} {row.label}: % of a task's test rows whose largest weight is on the expert."
        yield "router", plots.heat(shares, shares.to_numpy() / 100, TITLES["router"], note, axes=("task", "expert"))
    if "experts" in made:
        scores = made["experts"].set_index("expert").set_axis(tasks, axis="columns")
        share = scores.to_numpy() / [scores[task].get(task, np.nan) for task in tasks]
        note = f"{where} In points; shaded by the share of what the task's own expert (framed) scores."
        yield "experts", plots.heat(scores, share, TITLES["experts"], note, axes=("expert", "task"))
