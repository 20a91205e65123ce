"""How many settings of a row's method held-out rows have scored, and which place the row's own setting takes there."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from twinbench.records.record import experts_of
from twinbench.report.blocks import Column, Row, Run, blocks

Setting = tuple[str, str]  # a method's parameters and its router, as JSON
Shares = dict[Column, float]  # scores in parts of the individual expert's


@dataclass(frozen=True)
class Settings:
    """The settings of one method that were scored on held-out rows of the same experts, search by search, newest first.

    A search is what may stand in one table: one (suite_id, precision, protocol).
    """

    searches: tuple[Mapping[Setting, Shares], ...] = ()

    @property
    def tried(self) -> int:
        """How many settings there are in all searches together. The seeds of a setting count once."""
        return len({setting for settings in self.searches for setting in settings})

    def place(self, row: Row, counted: list[Column]) -> str | None:
        """The place of the row's setting in the largest search that has it, as in "1 of 8"; of several, in the newest.

        A router that was not searched has the place of its method's parameters under the best router that was.

        Args:
            row: of the same method, on other rows of the same tasks.
            counted: the columns that the average is over. A setting that lacks one does not count.

        Returns:
            None if no search has it beside another setting.
        """
        own, found = _setting(row), []
        for settings in self.searches:
            means = {setting: np.mean([shares[c] for c in counted]) for setting, shares in _whole(settings, counted)}
            alike = [mean for (params, _), mean in means.items() if params == own[0]]
            if alike and len(means) > 1:
                mean = means.get(own, max(alike))
                found.append((len(means), 1 + sum(other > mean for other in means.values())))
        return "{1} of {0}".format(*max(found, key=lambda place: place[0])) if found else None


def settings(rows: Iterable[Mapping]) -> dict[tuple[str, str], Settings]:
    """Per suite_id and method the settings that were scored on held-out rows of the same experts.

    Another limit of the test is another suite_id of the same experts.

    Args:
        rows: of all runs, as ``records.store.latest`` gives them.
    """
    rows = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["time"])
    newest: dict[str, dict] = {row["suite_id"]: {} for row in rows}
    for row in rows:
        newest[row["suite_id"]] |= experts_of(row)
    weights = {suite_id: frozenset(of.items()) or suite_id for suite_id, of in newest.items()}  # old records name none
    found: dict[tuple, list[dict[Setting, Shares]]] = {}
    for block in blocks(row for row in rows if row["split"] == "validation"):
        tops = _means(block.individual, block.columns)
        searches: dict[str, dict[Setting, Shares]] = {}
        for row in block.rows:
            scores = _means(row.runs, block.columns)
            shares = {column: scores[column] / tops[column] for column in scores if tops.get(column, 0) > 0}
            searches.setdefault(row.method, {})[_setting(row)] = shares
        for method, settings in searches.items():
            found.setdefault((weights[block.suite_id], method), []).append(settings)
    return {
        (suite_id, method): Settings(tuple(searches))
        for (mine, method), searches in found.items()
        for suite_id, theirs in weights.items()
        if theirs == mine
    }


def _means(runs: list[Run], columns: list[Column]) -> dict[Column, float]:
    """The mean score over the seeds, of the columns that each of them has."""
    whole = [column for column in columns if runs and all(column in run.scores for run in runs)]
    return {column: float(np.mean([run.scores[column] for run in runs])) for column in whole}


def _whole(settings: Mapping[Setting, Shares], counted: list[Column]) -> list[tuple[Setting, Shares]]:
    """The settings that have a score in each column that is counted; none where no column counts."""
    return [
        (setting, shares)
        for setting, shares in settings.items()
        if counted and all(column in shares for column in counted)
    ]


def _setting(row: Row) -> Setting:
    record = row.runs[0].records[0]
    params, router = (json.dumps(record[name], sort_keys=True) for name in ("params", "router"))
    return params, router
