"""Blocks -> sections: their tables, the notes on them and their figures, under the names that their files carry.

Each block has a section, and each suite_id one on its experts and one on its data, where these are known.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from twinbench.protocol import PROTOCOLS
from twinbench.report import by_tasks, expert_training, living, plots, tables, text
from twinbench.report.blocks import Block, Run
from twinbench.report.bootstrap import Draws
from twinbench.report.held_out import Settings
from twinbench.report.notes import notes as explained
from twinbench.report.section import Section

TITLES = {
    "scores": "Normalized score by task",
    "averages": "Average normalized score",
    "storage": "Score against storage",
    "router": "Where the router sends each task",
    "experts": "Each expert on each task",
    "learning": "Learning curves of the experts",
}


def title(name: str) -> str:
    """The title of the figure called ``name``."""
    return TITLES.get(name) or f"Average normalized score by {name.removeprefix('curve_')}"


@dataclass(frozen=True)
class Beside:
    """What is known beside the records.

    Attributes:
        training: per suite_id how its experts were trained, where that is known.
        draws: the resampled scores.
        constants: per suite_id and split the best constant answers to its tasks.
        doubts: per run_id what its predictions say otherwise than its record.
        held_out: per suite_id and method the settings that were scored on held-out rows.
    """

    training: Mapping[str, Mapping]
    draws: Draws
    constants: Mapping[tuple[str, str], Run]
    doubts: Mapping[str, list[str]]
    held_out: Mapping[tuple[str, str], Settings]


def make(found: list[Block], beside: Beside, name: str, reference: str, *, older: bool, where: str) -> list[Section]:
    """The sections of each suite_id: one per block, then its experts and its data.

    Args:
        name: of the report.
        older: whether suite_ids other than the first block's are older versions, which are not drawn.
        where: the setting ``results_dir=…`` of commands.
    """
    main, suites = found[0].suite_id, {block.suite for block in found}
    marks = plots.styles({row.method: row.role for block in found for row in block.rows}, _method(found, reference))
    sections, scored = [], []
    for suite_id, group in groupby(found, lambda block: block.suite_id):
        blocks, experts = list(group), beside.training.get(suite_id) or {}
        several, past = suite_id != main, suite_id != main and older
        for block in blocks:
            constant = beside.constants.get((block.suite_id, block.split))
            made = tables.make(block, beside.draws, reference, constant, beside.held_out)
            mend = None if past else where
            table = made.get("normalized")
            scored += [] if past or table is None else [(block, table)]
            notes = [] if table is None else _notes(block, made, reference, beside, mend)
            heading = (f"{block.suite}: " if len(suites) > 1 else "") + _heading(block, several)
            section = Section(heading, PROTOCOLS[block.protocol].sentence, _slug(block, several), past, made, notes, {})
            if not past:
                section.figures.update(_rendered(section, _draw(section, block, name, reference, marks)))
            sections.append(section)
        sections += _suite(blocks, experts, name, several=several, older=past)
    return [*by_tasks.sections(scored, name, marks), *sections]


def _notes(
    block: Block, made: Mapping[str, pd.DataFrame], reference: str, beside: Beside, where: str | None
) -> list[str]:
    return explained(block, made["normalized"], reference, dead=living.dead(made), doubts=beside.doubts, where=where)


def _suite(
    blocks: list[Block], training: Mapping[str, Mapping], name: str, *, several: bool, older: bool
) -> Iterator[Section]:
    """The sections on the experts and the data of one suite_id, where there is something to say."""
    suite_id = blocks[0].suite_id
    tail, stem = (f", suite_id {suite_id}", f"_{suite_id}") if several else ("", "")
    if training:
        made = expert_training.tables(training)
        section = Section(f"Experts{tail}", text.EXPERTS, f"experts{stem}", older, made, [], {})
        if not older:
            where = (
                f"{name}{tail}. The training loss is the mean over an epoch, the rest is measured after it; held-out "
                "rows are training data that no expert is trained on. Every panel has its own scale."
            )
            figure = expert_training.draw(made["learning"], TITLES["learning"], where)
            section.figures.update(_rendered(section, [("learning", figure)]))
        yield section
    origins = expert_training.origins(blocks, training)
    if len(origins):
        notes = expert_training.origin_notes(origins)
        yield Section(f"Data{tail}", text.DATA, f"data{stem}", older, {"origins": origins}, notes, {})


def _heading(block: Block, several: bool) -> str:
    """A block's protocol, its split where that is not the test, and its tasks where that tells it apart."""
    parts = [f"{block.protocol} protocol"] + ([] if block.split == "test" else [f"{block.split} split"])
    parts += [] if block.precision == "float32" else [f"forward passes in {block.precision}"]
    parts += ["adapted to the inputs that are scored"] if block.adapted else []
    parts += [f"{len(block.columns)} tasks, suite_id {block.suite_id}"] if several else []
    return ", ".join(parts)


def _slug(block: Block, several: bool) -> str:
    split = "" if block.split == "test" else f"_{block.split}"
    split += "" if block.precision == "float32" else f"_{block.precision}"
    split += "_adapted" if block.adapted else ""
    return f"{block.protocol}{split}" + (f"_{block.suite_id}" if several else "")


def _rendered(section: Section, drawn: Iterable[tuple[str, Figure]]) -> dict[str, dict[str, bytes]]:
    return {title: plots.render(figure, section.file(title)) for title, figure in drawn}


def _method(found: list[Block], reference: str) -> str:
    """The method that ``reference`` (a label or a method) belongs to."""
    return next((row.method for block in found if (row := block.find(reference))), reference)


def _draw(
    section: Section, block: Block, name: str, reference: str, marks: plots.Styles
) -> Iterator[tuple[str, Figure]]:
    """The figures of a block's section that have something to show, by name."""
    made = section.tables
    where = f"{name}, {section.heading}."
    methods = {row.label: row.method for row in block.rows}
    tasks = [task for task, _ in block.columns]
    table = made.get("normalized", pd.DataFrame({"average": []}))
    shown = table
    if "settings" in made:  # a search has more rows than a picture can show
        shown = table[(table["role"] != "") | table["method"].isin(made["settings"]["best setting"])]
    if table["average"].notna().any():
        scores = shown.set_index("method")[[*tasks, "average", "worst"]]
        share = (scores.to_numpy() / 100).clip(0) ** 2  # squared: most differences lie near the top
        dead = living.dead(made)
        share[:, [tasks.index(task) for task in dead]] = np.nan
        note = f"{where} In % of the individual expert's score; darker is better."
        note += f" Grey: the expert of {', '.join(dead)} is dead and counts in no average." if dead else ""
        yield "scores", plots.heat(scores, share, TITLES["scores"], note, apart=2)
        note = f"{where} Lines: 95 % bootstrap intervals over the scored examples; dashed: the bounds."
        yield "averages", plots.averages(shown, methods, marks, TITLES["averages"], note)
        for key, curve in tables.curves(block, table).items():
            methods_of = {name: name.partition(" (")[0] for name in curve["curve"]}
            bounds = table.loc[table["role"] != "", "average"]
            note = f"{where} Shaded: 95 % bootstrap intervals over {block.split} examples; dashed: the bounds."
            yield f"curve_{key}", plots.curves(curve, key, bounds, methods_of, marks, title(f"curve_{key}"), note)
        points = shown.merge(made["storage"], on="method").dropna(subset="average")
        note = f"{where} Up is better, left is smaller."
        note += " Without a name: another row is no larger and no worse." if len(points) > plots.CROWD else ""
        yield "storage", plots.storage(points, methods, marks, TITLES["storage"], note)
    row = block.find(reference)
    shares = row and tables.confusion(row, block.columns)
    if shares is not None:
        note = f"{where} {row.label}: % of a task's scored rows whose largest weight is on the expert."
        yield "router", plots.heat(shares, shares.to_numpy() / 100, TITLES["router"], note, axes=("task", "expert"))
    if "experts" in made:
        scores = made["experts"].set_index("expert").set_axis(tasks, axis="columns")
        share = scores.to_numpy() / [scores[task].get(task, np.nan) for task in tasks]
        note = f"{where} In points; shaded by the share of what the task's own expert (framed) scores."
        yield "experts", plots.heat(scores, share, TITLES["experts"], note, axes=("expert", "task"))
