"""Sections -> Markdown and LaTeX, with what a reader must know to read the numbers."""

from collections.abc import Sequence

import pandas as pd

from twinbench.report.catalog import Table
from twinbench.report.cells import PLAIN
from twinbench.report.section import Section

EXPERTS = "Each task's expert is the base model, fine-tuned by twinbench on that task alone."
DATA = "What the experts are trained and scored on."
READING = (
    "A normalized score is a method's score divided by that of `individual`, the task's own fine-tuned expert, under "
    "the strict protocol with the same experts and data, in %. So `individual` is 100 under strict, and what it loses "
    "under blind is the cost of routing. Averages are over the tasks whose expert is alive: it beats the best constant "
    "answer and the base. Where one of these is missing there is no average. "
    "`individual` (upper bound) and `pretrained` (lower bound) are not ranked."
)
OLDER = "Older results, with other experts or data"


def document(suite: str, sections: list[Section], tables: Sequence[Table], caveats: Sequence[str] = ()) -> str:
    """Those of the ``tables`` that a section has, for every section that has one, as one Markdown text.

    Args:
        caveats: paragraphs on what is wrong with the numbers; they come first.
    """
    lines = [f"# {suite}", "", *(f"> {paragraph}\n" for paragraph in caveats), READING, ""]
    main = True
    for section in sections:
        if not any(table.name in section.tables for table in tables):
            continue
        if main and section.older:
            main = False
            lines += [f"# {OLDER}", ""]
        lines += [f"## {_plain(section.heading)}", "", section.sentence, ""]
        notes = [f"{_plain(note)}\n" for note in section.notes]
        for table in (table for table in tables if table.name in section.tables):
            cells = table.cells(section.tables[table.name])
            lines += [f"### {table.title}", "", table.caption, "", markdown(cells), *notes]
            notes = []  # they stand below a section's first table
    return "\n".join(lines).rstrip("\n") + "\n"


def markdown(cells: pd.DataFrame) -> str:
    """A Markdown table, aligned so that it also reads well in a terminal; text to the left, numbers to the right."""
    lines = [list(cells.columns), *cells.to_numpy().tolist()]
    columns = []
    for name, *column in zip(*lines, strict=True):
        column = [_plain(cell).replace("|", "\\|") for cell in (name, *column)]
        width = max(3, *map(len, column))
        plain = name in PLAIN
        rule = "-" * width if plain else "-" * (width - 1) + ":"
        padded = [cell.ljust(width) if plain else cell.rjust(width) for cell in column]
        columns.append([padded[0], rule, *padded[1:]])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns, strict=True)) + "\n"


def _plain(words: str) -> str:
    """One line of Markdown that shows ``words`` and is neither HTML nor a link."""
    escapes = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "](": "]\\("}
    words = " ".join(words.split())
    for mark, shown in escapes.items():
        words = words.replace(mark, shown)
    return words


def latex(suite: str, section: Section, table: Table) -> str:
    """A table of the section as a booktabs ``table``, without what compares with the reference."""
    cells = table.cells(section.tables[table.name]).drop(
        columns=["#", "difference", "its 95 % interval", "p"], errors="ignore"
    )
    lines = [list(cells.columns), *cells.to_numpy().tolist()]
    head, *body = [" & ".join(_escaped(cell) for cell in line) + r" \\" for line in lines]
    caption = _escaped(f"{suite}, {section.heading}: {table.latex[1]}.")
    columns = "".join("l" if name in PLAIN else "r" for name in cells.columns)
    top = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    end = [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join([*top, head, r"\midrule", *body, *end]) + "\n"


def _escaped(cell: str) -> str:
    escapes = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    escapes |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    escapes |= {mark: f"\\{mark}" for mark in "&%$#_{}"}
    return "".join(escapes.get(letter, letter) for letter in " ".join(cell.split()))
