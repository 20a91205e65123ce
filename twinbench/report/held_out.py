"""How many settings of a row's method held-out rows have scored, and which place the row's own setting takes there."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from twinbench.protocol import NORMALIZER
from twinbench.records.record import UPPER
from twinbench.report.blocks import Column, Row

Setting = tuple[str, str]  # a method's parameters and its router, as JSON
Search = tuple[str, str, str]  # (suite_id, precision, protocol): what scores that are compared have in common
Shares = dict[Column, list[float]]  # scores in parts of the individual expert's, one per seed


@dataclass(frozen=True)
class Settings:
    """The settings of one method that were scored on held-out rows of the same experts, in one search or several."""

    searches: dict[Search, dict[Setting, Shares]] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        """How many there are. The seeds of a setting count once."""
        return len({setting for settings in self.searches.values() for setting in settings})

    def place(self, row: Row, counted: list[Column]) -> str | None:
        """The row's place by its average over the columns that are counted, as in "1 of 8"; None where it has none.

        Parameters that were scored under other routers alone have the place of the best of these. Of several searches
        the one with the most settings counts.
        """
        own = _setting(row.runs[0].records[0])
        found = []
        for settings in self.searches.values():
            means = {setting: _mean(shares, counted) for setting, shares in settings.items()}
            alike = [mean for (params, _), mean in means.items() if params == own[0]]
            mean = means.get(own, max(alike, default=np.nan))
            if np.isfinite(mean):
                found.append((len(means), 1 + sum(other > mean for other in means.values())))
        return "{1} of {0}".format(*max(found)) if found else None


def settings(rows: Iterable[Mapping]) -> dict[tuple[str, str], Settings]:
    """Per suite_id and method the settings that were scored on held-out rows of the same experts.

    Another limit of the test or another name is another suite_id of the same experts.

    Args:
        rows: of all runs, as ``records.store.latest`` gives them.
    """
    rows = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["time"])
    newest: dict[str, dict] = {row["suite_id"]: {} for row in rows}
    for row in rows:
        newest[row["suite_id"]] |= {row["task"]: row["expert"]} if row["expert"] else {}
    experts = {suite_id: frozenset(of.items()) or suite_id for suite_id, of in newest.items()}  # old records name none
    scored = [row for row in rows if row["split"] == "validation"]
    tops = {
        (row["suite_id"], row["precision"], row["task"], row["metric"]): row["value"]
        for row in scored
        if row["role"] == UPPER and row["protocol"] == NORMALIZER and row["primary"]
    }
    found: dict[tuple, dict[Search, dict[Setting, Shares]]] = {}
    for row in scored:
        searches = found.setdefault((experts[row["suite_id"]], row["method"]), {})
        search = row["suite_id"], row["precision"], row["protocol"]
        shares = searches.setdefault(search, {}).setdefault(_setting(row), {})
        top = tops.get((*search[:2], row["task"], row["metric"]), 0)
        if row["primary"] and top > 0:
            shares.setdefault((row["task"], row["metric"]), []).append(row["value"] / top)
    return {
        (suite_id, method): Settings(searches)
        for (mine, method), searches in found.items()
        for suite_id, theirs in experts.items()
        if theirs == mine
    }


def _setting(record: Mapping) -> Setting:
    params, router = (json.dumps(record[name], sort_keys=True) for name in ("params", "router"))
    return params, router


def _mean(shares: Shares, counted: list[Column]) -> float:
    """The average of the columns that are counted; NaN where one is missing, or none counts."""
    means = [np.mean(shares.get(column, np.nan)) for column in counted]
    return float(np.mean(means)) if means else np.nan
