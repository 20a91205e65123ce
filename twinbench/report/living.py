"""Is each expert alive: does it beat the best constant answer to its task, and its base, on the scored rows?

A dead expert says nothing about a merge, so its task counts in no average.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from twinbench.report import bootstrap
from twinbench.report.blocks import Block, Column, Run

ALIVE, DEAD, UNTESTED = "alive", "dead", "not tested"
OVER = tuple(f"over {name}{end}" for name in ("best constant", "base") for end in ("", "_low", "_high"))
COLUMNS = ["task", "metric", "score", "best constant", "base", *OVER, "expert is"]


@dataclass(frozen=True)
class Experts:
    """The experts of a block, task by task.

    Attributes:
        living: the tasks that count in averages: those whose expert is not dead.
        constant: the best constant answers as a run; None where none is known.
        table: per task the expert's score, that of the best constant answer and of the unmerged base, in points.
    """

    living: list[Column]
    constant: Run | None
    table: pd.DataFrame


def checked(block: Block, draws: bootstrap.Draws, constant: Run | None) -> Experts:
    """Compare each expert with the best constant answer, and with the base.

    An expert is alive if the 95 % intervals of its leads over the best constant answer and over the base, where that
    was scored, are above 0. It is not tested where its predictions or the labels are unknown; then it counts.
    """
    lines = [_line(block, draws, column, constant) for column in block.columns] if block.individual else []
    gone = {line["task"] for line in lines if line["expert is"] == DEAD}
    counted = [column for column in block.columns if column[0] not in gone]
    return Experts(counted, constant, pd.DataFrame(lines, columns=COLUMNS) if lines else pd.DataFrame())


def dead(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """The tasks that count in no average, of a section's tables."""
    table = tables.get("living")
    return [] if table is None else table.loc[table["expert is"] == DEAD, "task"].tolist()


def _line(block: Block, draws: bootstrap.Draws, column: Column, constant: Run | None) -> dict:
    own = bootstrap.over_seeds(block.individual, column, draws)
    line = {"task": column[0], "metric": column[1], "expert is": UNTESTED}
    line["score"] = 100 * _mean(block.individual, column)
    for name, runs in (("best constant", [constant] if constant else []), ("base", block.base)):
        line[name] = 100 * _mean(runs, column)
        line[f"over {name}"] = line["score"] - line[name]
        other = bootstrap.over_seeds(runs, column, draws)
        if own is not None and other is not None:
            low, high, _ = bootstrap.paired(100 * own, 100 * other)
            line |= {f"over {name}_low": low, f"over {name}_high": high}
            if low <= 0:
                line["expert is"] = DEAD
            elif name == "best constant":
                line["expert is"] = ALIVE
    return line


def _mean(runs: list[Run], column: Column) -> float:
    scores = [run.scores.get(column, np.nan) for run in runs]
    return float(np.mean(scores)) if scores else np.nan
