"""DataFrames -> cells of text: numbers rounded, spreads and intervals beside their number, empty where missing."""

from collections.abc import Callable

import pandas as pd

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
    "expert is",
    "best setting",
    "place in the largest search",
)
PLAIN = (*NAMES, *WORDS)  # columns of text; the others are of numbers
COUNTS = ("settings tried",)  # columns of whole numbers


def rounded(digits: Callable[[float], str]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """A function that shows a table column by column, its numbers as ``digits`` gives them."""

    def shown(table: pd.DataFrame) -> pd.DataFrame:
        cells = {}
        for column in table.columns:
            if column == "seeds":
                cells |= _seeds(table)
            elif not column.endswith("_std"):
                cells[column] = _column(table, column, str if column in PLAIN + COUNTS else digits)
        return pd.DataFrame(cells)

    return shown


def living(table: pd.DataFrame) -> pd.DataFrame:
    """The scores in points, and each lead with its interval."""
    cells = {name: _column(table, name) for name in ("score", "best constant", "base")}
    for name in ("over best constant", "over base"):
        cells[name] = _column(table, name, "{:+.1f}".format)
        cells[f"{name}, 95 %"] = _ranges(table, name, "{:+.1f}")
    return pd.DataFrame({name: table[name] for name in ("task", "metric")} | cells | {"expert is": table["expert is"]})


def normalized(table: pd.DataFrame) -> pd.DataFrame:
    """The normalized table, its bounds and its reference marked in their names."""
    places = list(table.columns)
    tasks = places[places.index("seeds") + 1 : places.index("average")]
    marks = table["role"].where(~table["reference"], "reference")
    labels = [f"{label} [{mark}]" if mark else label for label, mark in zip(table["method"], marks, strict=True)]
    cells = {"#": _column(table, "rank", str), "tier": _column(table, "tier", str), "method": labels}
    cells |= _seeds(table) | {task: _column(table, task) for task in tasks}
    cells["average"] = _column(table, "average")
    cells["95 % interval"] = _ranges(table, "average", "{:.1f}")
    cells["worst task"] = [
        "" if pd.isna(score) else f"{score:.1f} {task}"
        for score, task in zip(table["worst"], table["worst_task"], strict=True)
    ]
    if table["corrected"].notna().any():
        cells["chance-corrected"] = _column(table, "corrected")
    cells["difference"] = _column(table, "difference", lambda value: f"{value:+.1f}")
    cells["its 95 % interval"] = _ranges(table, "difference", "{:+.1f}")
    cells["p"] = _p(table)
    return pd.DataFrame(cells)


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Differences with their sign; * marks an interval without 0."""
    cells = {"method": table["method"]}
    for name in (column for column in table.columns if f"{column}_low" in table):
        clear = (table[f"{name}_low"] > 0) | (table[f"{name}_high"] < 0)
        cells[name] = [f"{value:+.1f}{'*' if star else ''}" for value, star in zip(table[name], clear, strict=True)]
    cells["its 95 % interval"] = _ranges(table, "average", "{:+.1f}")
    return pd.DataFrame(cells | {"p": _p(table)})


def losses(table: pd.DataFrame) -> pd.DataFrame:
    """What is kept and lost, each loss with its interval."""
    cells = {"method": table["method"], "average": _column(table, "average")}
    for name in ("lost to the route", "lost to the parts"):
        cells[name] = _column(table, name, "{:+.1f}".format)
        cells[f"{name}, 95 %"] = _ranges(table, name, "{:+.1f}")
    return pd.DataFrame(cells | {"without parts": _column(table, "without parts")})


def spans(table: pd.DataFrame) -> pd.DataFrame:
    """Each number with the ends of its span behind it, where it has one."""
    cells = {"method": table["method"]}
    for name in (column for column in table.columns if f"{column}_low" in table):
        ends = _ranges(table, name, "{:.1f}")
        cells[name] = [
            f"{shown} ({end})" if end else shown for shown, end in zip(_column(table, name), ends, strict=True)
        ]
    return pd.DataFrame(cells)


def _p(table: pd.DataFrame) -> list[str]:
    """Each p, with ≤ where so many resamples can show no smaller one."""
    least = table["p_least"] == True  # noqa: E712 (a row without a p has none)
    return [f"≤ {cell}" if floor else cell for cell, floor in zip(_column(table, "p", _four), least, strict=True)]


def _four(value: float) -> str:
    return f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


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
