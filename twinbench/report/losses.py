"""Where a routed method loses: to its route, and to what its parts leave out of the experts."""

import pandas as pd

from twinbench.report import bootstrap
from twinbench.report.blocks import Block, Column, Row
from twinbench.report.shared_expert import KEY, NONE, mean

ROUTES = ("router", "top1", "layer")


def losses(block: Block, draws: bootstrap.Draws, counted: list[Column]) -> pd.DataFrame:
    """Each routed row beside the same method told the task and beside the model without its parts.

    Rows of which the former was not run are left out.

    Args:
        counted: the tasks that averages are over.

    Returns:
        Columns method, average (normalized, %), and in percentage points with ``_low`` and ``_high`` of paired 95 %
        intervals ``lost to the route`` (told the task minus the row) and ``lost to the parts`` (individual minus told
        the task); ``without parts``: the average of the model that the parts are added to, NaN if it was not run on
        all tasks.
    """
    lines = []
    for row in block.rows:
        if row.oracle or row.role or row.runs[0].records[0]["route"] not in ROUTES:
            continue
        told = next((o for o in block.rows if o.oracle and o.method == row.method and _own(o) == _own(row)), None)
        line = told and _line(block, draws, row, told, counted)
        lines += [line] if line else []
    found = pd.DataFrame(lines)
    return found.sort_values("average", ascending=False, ignore_index=True) if lines else found


def _line(block: Block, draws: bootstrap.Draws, row: Row, told: Row, counted: list[Column]) -> dict | None:
    sides = [
        bootstrap.averages(runs, block.individual, counted, draws) for runs in (block.individual, told.runs, row.runs)
    ]
    if any(side is None for side in sides):
        return None
    means = [100.0, mean(block, told, counted), mean(block, row, counted)]
    line = {"method": row.label, "average": means[2]}
    for name, above, below in (("route", 1, 2), ("parts", 0, 1)):
        line[f"lost to the {name}"] = means[above] - means[below]
        low, high, _ = bootstrap.paired(sides[above], sides[below])
        line |= {f"lost to the {name}_low": low, f"lost to the {name}_high": high}
    without = next((other for other in block.rows if _is_shared_of(other, row)), None)
    whole = without and all(column in run.scores for run in without.runs for column in counted)
    return line | {"without parts": mean(block, without, counted) if whole else None}


def _own(row: Row) -> dict:
    """A row's settings but for those of its router."""
    return {key: value for key, value in row.settings.items() if key != "router" and not key.startswith("router.")}


def _is_shared_of(other: Row, row: Row) -> bool:
    """Whether a row is the model that another's parts are added to: its shared expert, or else the base."""
    settings = {k.removeprefix("shared."): v for k, v in row.settings.items() if k.startswith("shared.")}
    return other.method == row.settings.get(KEY, NONE) and _own(other) == settings
