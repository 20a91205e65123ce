"""Tasks that have no expert: how far each row is above the unmerged base, over the same examples."""

import numpy as np
import pandas as pd

from twinbench.records.record import LOWER
from twinbench.report import bootstrap
from twinbench.report.blocks import Block, Column, Row


def unseen(block: Block, draws: bootstrap.Draws) -> pd.DataFrame:
    """Score minus the lower bound's, in points, per task without an expert and on the average.

    Returns:
        ``method``, per task and for the ``average`` the difference with ``_low`` and ``_high`` of its paired 95 %
        interval, and ``p`` of the average, corrected for the lines; no line where there is no such task or no base.
    """
    columns = [column for column in block.columns if column[0] in _tasks(block)]
    base = next((row for row in block.rows if row.role == LOWER), None)
    if base is None or not columns:
        return pd.DataFrame()
    table = pd.DataFrame(
        [line for row in block.rows if row is not base and (line := _line(row, base, columns, draws)) is not None]
    )
    return bootstrap.corrected(table)


def _tasks(block: Block) -> set[str]:
    records = [record for row in block.rows for run in row.runs for record in run.records]
    return {record["task"] for record in records} - {record["task"] for record in records if record["expert"]}


def _line(row: Row, base: Row, columns: list[Column], draws: bootstrap.Draws) -> dict | None:
    line, sides = {"method": row.label}, []
    for column in columns:
        mine, theirs = (bootstrap.over_seeds(side.runs, column, draws) for side in (row, base))
        if mine is None or theirs is None:
            return None
        sides.append((100 * mine, 100 * theirs))
        points = [100 * np.mean([run.scores[column] for run in side.runs]) for side in (row, base)]
        line[column[0]] = points[0] - points[1]
        line[f"{column[0]}_low"], line[f"{column[0]}_high"], _ = bootstrap.paired(*sides[-1])
    line["average"] = float(np.mean([line[task] for task, _ in columns]))
    mine, theirs = (np.mean(side, axis=0) for side in zip(*sides, strict=True))
    line["average_low"], line["average_high"], line["p"] = bootstrap.paired(mine, theirs)
    return line
