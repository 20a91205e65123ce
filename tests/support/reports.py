"""Committed reports, read: what the prose and the tables of README.md and results/README.md are tested against."""

from functools import cache

import pandas as pd

from support.commands import ROOT

REPORTS = ROOT / "results" / "reference" / "reports"
POOLER_MERGED = "55f7c705e820"  # the suite_id; a report names the files of its older suites by theirs
TWIN = "twin_merging (method@shared=task_arithmetic, router={})"


@cache
def table(report: str, name: str) -> pd.DataFrame:
    frame = pd.read_csv(REPORTS / report / f"{name}.csv")
    return frame.set_index("method" if "method" in frame else "task")


def kept(method: str, report: str, name: str) -> str:
    """What a row keeps, with its interval."""
    line = table(report, name).loc[method]
    return f"{line.average:.1f} ({line.average_low:.1f} to {line.average_high:.1f})"


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A table whose first column is words and whose others are numbers."""
    marks = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, marks, *lines])


def heads() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The demo's scores with BERT's pooler merged, and with it in the head."""
    newer, older = sorted(REPORTS.glob("demo_head/strict*_normalized.csv"), key=lambda file: len(file.name))
    merged, kept = (older, newer) if POOLER_MERGED in older.name else (newer, older)
    return tuple(pd.read_csv(file).set_index("method") for file in (merged, kept))
