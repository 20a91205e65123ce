"""What one setting is worth: rows that differ in it alone, compared task by task over the same test examples."""

import json

import numpy as np
import pandas as pd

from twinbench.report import bootstrap
from twinbench.report.blocks import Block, Column, Row

KEY, NONE = "method@shared", "pretrained"


def shared(block: Block, draws: bootstrap.Draws, counted: list[Column]) -> pd.DataFrame:
    """Normalized score of each row with a shared expert minus that of the row without (``method@shared=pretrained``:
    base + SVD of expert - base) that is equal to it otherwise, so at equal bytes of exclusive parts.

    Returns:
        ``method`` (the row with a shared expert), per task and for the ``average`` the difference in percentage points
        with ``_low`` and ``_high`` of its paired 95 % interval over the scored examples, and ``p`` of the average,
        corrected for the lines of the table; ``p_least``: it could be no smaller.

    Args:
        counted: the tasks that the average is over.
    """
    lines = []
    for rows in _alike(block.rows):
        without = next((row for row in rows if row.settings[KEY] == NONE), None)
        lines += [_line(block, draws, row, without, counted) for row in rows if without and row is not without]
    return bootstrap.corrected(pd.DataFrame([line for line in lines if line]))


def _alike(rows: list[Row]) -> list[list[Row]]:
    """Rows of the same method and settings but for those of the shared expert."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if KEY in row.settings:
            own = [key for key in row.settings if key == KEY or key.startswith("shared.")]
            rest = {key: value for key, value in row.settings.items() if key not in own}
            groups.setdefault(json.dumps([row.method, rest], sort_keys=True), []).append(row)
    return list(groups.values())


def _line(block: Block, draws: bootstrap.Draws, row: Row, without: Row, counted: list[Column]) -> dict | None:
    line = {"method": row.label}
    for name, columns in [*((task, [(task, metric)]) for task, metric in block.columns), ("average", counted)]:
        sides = [bootstrap.averages(side.runs, block.individual, columns, draws) for side in (row, without)]
        if any(side is None for side in sides):
            return None
        line[name] = mean(block, row, columns) - mean(block, without, columns)
        line[f"{name}_low"], line[f"{name}_high"], p = bootstrap.paired(*sides)
    return line | {"p": p}


def mean(block: Block, row: Row, columns: list) -> float:
    """The row's average normalized score over some columns, in percent."""
    tops, bottoms = (
        [np.mean([run.scores[column] for run in runs]) for column in columns] for runs in (row.runs, block.individual)
    )
    return float(100 * np.mean(np.divide(tops, bottoms)))
