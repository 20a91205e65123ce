"""DataFrames -> readable text: the same rounded cells for the terminal, Markdown, LaTeX and the page."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from twinbench.report.sections import Section

TITLES = {
    "normalized": "Normalized score (%)",
    "raw": "Raw score (points)",
    "storage": "Storage (MB) and data needs",
    "time": "Time (s)",
    "router": "Router accuracy (%)",
    "experts": "Each expert on each task (points)",
    "shared": "With a shared expert minus without (percentage points)",
    "published": "Published scores (normalized, %)",
    "failed": "Failed runs",
    "training": "How the experts were trained",
    "learned": "Held-out score after each epoch (points)",
    "seconds": "Training time (s)",
    "origins": "Rows and where they come from",
}
CAPTIONS = {
    "normalized": "In % of the individual expert's score, best average first. ± is the standard deviation over seeds. "
    "Intervals and p: paired bootstrap over test examples, 1,000 resamples.",
    "raw": "×100, in the metric named in the column.",
    "storage": "Bytes written / 10⁶. Exclusive parts stored dense take as much as an expert each, also where the "
    "method's authors would store masks or factors; empty: the record is older than this column. "
    "Data needs: what the method and its router read beside the experts' weights, apart from choosing hyperparameters.",
    "time": "Merging and router training (reading its training rows included): once; empty where a record is older "
    "than the measurement. Routing and evaluation: the sum over all tasks and splits scored. Per 1000 rows: routing "
    "and evaluation together, over the rows of those splits.",
    "router": "Share of a task's test rows whose largest router weight is on the task's own expert.",
    "experts": "×100. Row: the one expert used. Column: the task. The diagonal is each expert on its own task.",
    "shared": "Normalized score of the row minus that of the row without a shared expert (shared.method=pretrained) "
    "that is equal to it otherwise: the same router settings and bytes of exclusive parts. * marks a paired 95 % "
    "bootstrap interval over test examples without 0; the CSV has all intervals.",
    "published": "As others published them, with their checkpoints and evaluation sets. Ours: the average of our row "
    "of that name. Difference: ours - theirs, only where base and experts are the same.",
    "failed": "These ended in an error and have no result.",
    "training": "AdamW from the base model, linear warm-up (a fraction of the steps), linear decay to 0. Rows: those "
    "trained on. Frozen: parameters that stay the base's, by how their names begin.",
    "learned": "×100, in the task's primary metric, on the held-out rows. The expert is what the last epoch leaves; no "
    "epoch is chosen.",
    "seconds": "Of one expert from the loaded base to the saved model, scoring after each epoch included.",
    "origins": "Rows per split. Experts are trained on train; validation is held out of the training data, for the "
    "learning curves, the router and choices; scores are on test, and on what else is named.",
}

EXPERTS = "Each task's expert is the base model, fine-tuned by twinbench on that task alone."
DATA = "What the experts are trained and scored on."
READING = (
    "A normalized score is a method's score divided by that of `individual`, the task's own fine-tuned expert, under "
    "the strict protocol with the same experts and data, in %. So `individual` is 100 under strict, and what it loses "
    "under blind is the cost of routing. The average is over all tasks; where one is missing there is none. "
    "`individual` (upper bound) and `pretrained` (lower bound) are not ranked."
)
OLDER = "Older results, with other experts or data"
LATEX_CAPTIONS = {"normalized": "score in % of the individual expert's", "training": "how each was trained"}
NAMES = ("method", "expert", "task")  # columns that name a row
WORDS = (
    "exclusive stored as",
    "data needs",
    "status",
    "error",
    "source",
    "metric",
    "frozen",
    "computed in",
    "device",
    "origin",
)
PLAIN = (*NAMES, *WORDS)  # columns of text; the others are of numbers


def document(suite: str, sections: "list[Section]", names: tuple[str, ...], caveats: Sequence[str] = ()) -> str:
    """The tables called ``names`` of every section that has one, as one Markdown text.

    Args:
        caveats: paragraphs on what is wrong with the numbers; they come first.
    """
    lines = [f"# {suite}", "", *(f"> {paragraph}\n" for paragraph in caveats), READING, ""]
    main = True
    for section in sections:
        if not set(names) & set(section.tables):
            continue
        if main and section.older:
            main = False
            lines += [f"# {OLDER}", ""]
        lines += [f"## {_plain(section.heading)}", "", section.sentence, ""]
        for name in names:
            if name in section.tables:
                lines += [f"### {TITLES[name]}", "", CAPTIONS[name], "", markdown(shown(name, section.tables[name]))]
            if name in ("normalized", "origins"):
                lines += [f"{_plain(note)}\n" for note in section.notes]
    return "\n".join(lines).rstrip("\n") + "\n"


def shown(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """The table called ``name`` as rounded strings, spreads and intervals beside their number, empty where missing."""
    if name == "normalized":
        return _normalized(table)
    if name == "shared":
        return _differences(table)
    digits: Callable[[float], str] = {
        "storage": lambda value: f"{value / 1e6:.2f}",
        "time": lambda value: f"{value:.2f}",
        "failed": str,
        "training": lambda value: f"{value:.0f}" if value == int(value) else f"{value:g}",
        "seconds": lambda value: f"{value:.0f}",
        "origins": lambda value: f"{value:.0f}",
    }.get(name, lambda value: f"{value:.1f}")
    cells = {}
    for column in table.columns:
        if column == "seeds":
            cells |= _seeds(table)
        elif not column.endswith("_std"):
            cells[column] = _column(table, column, str if column in PLAIN else digits)
    return pd.DataFrame(cells)


def _normalized(table: pd.DataFrame) -> pd.DataFrame:
    places = list(table.columns)
    tasks = places[places.index("seeds") + 1 : places.index("average")]
    marks = table["role"].where(~table["reference"], "reference")
    labels = [f"{label} [{mark}]" if mark else label for label, mark in zip(table["method"], marks, strict=True)]
    cells = {"#": _column(table, "rank", str), "method": labels}
    cells |= _seeds(table) | {task: _column(table, task) for task in tasks}
    cells["average"] = _column(table, "average")
    cells["95 % interval"] = _ranges(table, "average", "{:.1f}")
    cells["worst task"] = [
        "" if pd.isna(score) else f"{score:.1f} {task}"
        for score, task in zip(table["worst"], table["worst_task"], strict=True)
    ]
    cells["difference"] = _column(table, "difference", lambda value: f"{value:+.1f}")
    cells["its 95 % interval"] = _ranges(table, "difference", "{:+.1f}")
    cells["p"] = _column(table, "p", lambda value: f"{value:.3f}")
    return pd.DataFrame(cells)


def _differences(table: pd.DataFrame) -> pd.DataFrame:
    cells = {"method": table["method"]}
    for name in (column for column in table.columns if f"{column}_low" in table):
        clear = (table[f"{name}_low"] > 0) | (table[f"{name}_high"] < 0)
        cells[name] = [f"{value:+.1f}{'*' if star else ''}" for value, star in zip(table[name], clear, strict=True)]
    cells["its 95 % interval"] = _ranges(table, "average", "{:+.1f}")
    return pd.DataFrame(cells | {"p": _column(table, "p", lambda value: f"{value:.3f}")})


def _seeds(table: pd.DataFrame) -> dict[str, list[str]]:
    """The column of seed counts, where any row has several."""
    several = "seeds" in table and (table["seeds"] > 1).any()
    return {"seeds": _column(table, "seeds", str)} if several else {}


def _column(table: pd.DataFrame, name: str, digits: Callable = "{:.1f}".format) -> list[str]:
    spreads = table.get(f"{name}_std", pd.Series(float("nan"), table.index))
    return [
        "" if pd.isna(value) else digits(value) + ("" if pd.isna(spread) else f" ± {digits(spread)}")
        for value, spread in zip(table[name], spreads, strict=True)
    ]


def _ranges(table: pd.DataFrame, name: str, digits: str) -> list[str]:
    return [
        "" if pd.isna(low) else f"{digits.format(low)} to {digits.format(high)}"
        for low, high in zip(table[f"{name}_low"], table[f"{name}_high"], strict=True)
    ]


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


def latex(suite: str, section: "Section", name: str) -> str:
    """The section's table called ``name`` as a booktabs ``table``, without what compares with the reference."""
    cells = shown(name, section.tables[name]).drop(
        columns=["#", "difference", "its 95 % interval", "p"], errors="ignore"
    )
    lines = [list(cells.columns), *cells.to_numpy().tolist()]
    head, *body = [" & ".join(_escaped(cell) for cell in line) + r" \\" for line in lines]
    caption = _escaped(f"{suite}, {section.heading}: {LATEX_CAPTIONS[name]}.")
    columns = "".join("l" if name in PLAIN else "r" for name in cells.columns)
    top = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    end = [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join([*top, head, r"\midrule", *body, *end]) + "\n"


def _escaped(cell: str) -> str:
    escapes = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    escapes |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    escapes |= {mark: f"\\{mark}" for mark in "&%$#_{}"}
    return "".join(escapes.get(letter, letter) for letter in " ".join(cell.split()))
