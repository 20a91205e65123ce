"""What a reader must know of a table's empty cells: why they are empty, and what fills them."""

from collections.abc import Mapping, Sequence

import pandas as pd

from twinbench.report.blocks import Block
from twinbench.report.tables import normalizers


def notes(
    block: Block,
    table: pd.DataFrame,
    reference: str,
    *,
    dead: Sequence[str],
    doubts: Mapping[str, Sequence[str]],
    where: str | None,
) -> list[str]:
    """Why cells of the normalized ``table`` are empty, one note each; commands stand in backticks.

    Args:
        dead: the tasks whose experts are dead.
        doubts: per run_id what its predictions say otherwise than its record (``read.predictions``).
        where: the setting ``results_dir=…``; None for older results, which no command can add to.
    """
    found = _normalizing(block, where) + _incomplete(block)
    if dead:
        left = "" if len(dead) < len(block.columns) else " No expert is alive, so there is no average."
        them = (
            f"Dead: the expert of {', '.join(dead)} does not significantly beat the best constant answer and the base"
        )
        found.append(f"{them}; the task counts in no average.{left}")
    if block.outdated:
        older = ", ".join(f"seed {record['seed']} of {label}" for label, record in block.outdated)
        found.append(f"Left out: {older}. The source of its method has changed since, and other seeds have newer runs.")
    if block.of_older_experts:
        older = ", ".join(sorted({record["method"] for record in block.of_older_experts}))
        them = f"Left out: {older}, measured with the experts of an earlier training."
        found.append(f"{them} The same command measures them again.")
    for row in block.rows:
        for run in row.runs:
            if said := doubts.get(run.run_id):
                found.append(f"Predictions not used: those of {row.label}, run {run.run_id}, give {'; '.join(said)}.")
    bare = table["average"].notna() & table["average_low"].isna()
    if bare.any():
        found.append(
            f"No interval for {', '.join(table.loc[bare, 'method'])}: per-example predictions are missing or not used, "
            "a metric is not one of labels and predictions, or an individual score is 0 or less in some resample."
        )
    short = table["average"].isna() & bool(normalizers(block)) & (len(dead) < len(block.columns))
    if short.any():
        found.append(f"No average for {', '.join(table.loc[short, 'method'])}: not every task has a normalized score.")
    if len(table) and not table["reference"].any():
        found.append(f"No differences: no row is called {reference}.")
    return found


def _normalizing(block: Block, where: str | None) -> list[str]:
    """Which tasks are not normalized, and the command that measures what they are divided by."""
    split = "" if block.split == "test" else f" split={block.split}"
    command = f"`python run.py suite={block.suite} method=individual{split} {where}"
    same = "with the same suite settings as these runs"
    if not block.individual:
        mend = f"; this measures it, {same}: {command}`" if where else ""
        return [f"Nothing is normalized: no run of individual under the strict protocol with these experts{mend}."]
    left = [column for column in block.columns if column not in normalizers(block)]
    absent = [task for task, metric in left if any((task, metric) not in run.scores for run in block.individual)]
    low = [task for task, _ in left if task not in absent]
    found = [f"Not normalized: {', '.join(low)}; the individual score is 0 or less."] if low else []
    if absent:
        mend = f"; this measures it again, {same}: {command} force=true`" if where else ""
        found.append(f"Not normalized: {', '.join(absent)}; a run of individual has no score there{mend}.")
    return found


def _incomplete(block: Block) -> list[str]:
    """The runs that lack a score which other runs with the same experts and data have."""
    found = []
    for row in [*block.rows, *block.experts]:
        for run in row.runs:
            absent = [task for task, metric in block.columns if (task, metric) not in run.scores]
            if absent:
                found.append(f"Incomplete: {row.label}, run {run.run_id}, has no score of {', '.join(absent)}.")
    return found
