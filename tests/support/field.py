"""The tables and figures of results/README.md on the field of 2026, as its committed reports give them."""

import itertools
from functools import cache

import numpy as np
import pandas as pd
import yaml

from support.commands import ROOT
from support.reports import markdown, table

TOLD = "twin_merging", "tsv_c", "auto_switch", "t_switch", "tall_masks", "emr", "free"  # here told the task of a row
OWN = "esm_pp", "smile", "mass"  # pick parts by themselves
BOUNDS = "individual", "pretrained"
SEARCH, NAME = "glue_minilm_field_select", "strict_validation_bfloat16"
PUBLISHED = "Official results figure, kiddo127/ESM at fc82fe7"


@cache
def defaults(group: str, name: str) -> dict:
    """What ``conf/GROUP/NAME.yaml`` holds."""
    return yaml.safe_load((ROOT / f"conf/{group}/{name}.yaml").read_text(encoding="utf-8"))


def number(word: object) -> float | str:
    """A setting's value, however it is written: 1e-06 and 1e-6 are one, True and true, too."""
    try:
        return float(word)
    except (TypeError, ValueError):
        return str(word).lower()


def settings(label: str) -> dict[str, str]:
    """What a row's name says of its settings, e.g. of ``tsv_m (scaling=1.2)``; its router is none of them."""
    said = dict(item.split("=") for item in label.removesuffix(")").partition(" (")[2].split(", ") if item)
    return {key: value for key, value in said.items() if key not in ("router", "method@shared")}


def is_default(label: str) -> bool:
    """Whether the settings that a row names are the defaults of its method, its router and its shared expert."""
    name = label.partition(" ")[0]

    def usual(key: str) -> object:
        group, _, own = key.rpartition(".")
        if group == "router":
            return defaults("router", name)["features"][own]
        return defaults("method", "task_arithmetic" if group == "shared" else name)[own]

    return all(number(value) == number(usual(key)) for key, value in settings(label).items())


def scored(report: str, name: str) -> pd.DataFrame:
    """The rows of a report but its bounds: their scores, bytes and data needs, ``label``, ``method``, ``router``."""
    rows = table(report, f"{name}_normalized").join(table(report, f"{name}_storage")[["total", "data needs"]])
    rows = rows.rename_axis("label").reset_index()
    rows["method"] = rows["label"].str.partition(" ")[0]
    rows["router"] = rows["label"].str.extract(r"router=(\w+)", expand=False)
    return rows[~rows["method"].isin(BOUNDS)].assign(usual=rows["label"].map(is_default))


def searched() -> pd.DataFrame:
    """By method the row of its best setting on held-out rows, best first; with its default's average beside it."""
    rows = scored(SEARCH, NAME)
    best = rows.loc[rows.groupby("method")["average"].idxmax()].set_index("method")
    default = rows[rows["usual"]].set_index("method")["average"]
    return best.assign(settings=rows.groupby("method").size(), default=default).sort_values("average", ascending=False)


def leaderboard(rows: pd.DataFrame) -> str:
    def line(row: pd.Series) -> list[str]:
        said = ", ".join(f"{key}={value}" for key, value in settings(row.label).items())
        average = f"{row.average:.1f} ({row.average_low:.1f} to {row.average_high:.1f})"
        default = "not searched" if pd.isna(row.default) else f"{row.default:.1f}"
        return [f"`{row.name}`", said, average, default, f"{row.settings}", row["data needs"], f"{row.total / 1e6:.0f}"]

    heads = ["method", "best setting", "average", "at its defaults", "settings", "data needs", "MB"]
    return markdown(heads, [line(row) for _, row in rows.iterrows()])


def single_models() -> tuple[str, list[str]]:
    """What is one model for all tasks; and how its order agrees with the published one."""
    rows = searched()
    single = rows.drop(index=[*TOLD, *OWN])
    assert (single["average_high"] < rows.loc["twin_merging", "average_low"]).all()
    theirs = (
        pd.read_csv(ROOT / "results/literature/glue.csv").query("source == @PUBLISHED").set_index("method")["value"]
    )
    both = single.loc[(single["data needs"] == "nothing") & single.index.isin(theirs.index)]
    assert len(both) == 7
    tuned, usual = (agreement(both[column], theirs[both.index]) for column in ("average", "default"))
    gains = (rows["average"] - rows["default"]).map("{:.1f}".format)
    said = [
        f"{len(single)} of them are one model",
        f"The rank correlation with our tuned rows is {tuned}, with our defaults {usual}",
        f"WUDI gains {gains.wudi} points by its settings, DARE-TIES {gains.dare_ties}, PCB {gains.pcb}, SMILE "
        f"{gains.smile} and Breadcrumbs {gains.breadcrumbs}, TSV-M {gains.tsv_m} and CART {gains.cart}",
    ]
    return leaderboard(single), said


def agreement(ours: pd.Series, theirs: pd.Series) -> str:
    """Spearman's rank correlation, with the share of all orders that agree or disagree as much."""
    one, other = (side.rank().to_numpy() for side in (ours, theirs))
    found = np.corrcoef(one, other)[0, 1]
    chance = [np.corrcoef(order, other)[0, 1] for order in itertools.permutations(one)]
    return f"{found:.2f} (p = {np.mean(np.abs(chance) >= abs(found) - 1e-9):.3f})"


def told_the_task() -> tuple[str, list[str]]:
    return leaderboard(searched().loc[lambda rows: rows.index.isin(TOLD)]), []


def own_routes() -> tuple[str, list[str]]:
    return leaderboard(searched().loc[lambda rows: rows.index.isin(OWN)]), []


def on_the_demo(kind: str) -> pd.DataFrame:
    """The demo's rows at defaults: of "single" models, of methods "told" the task, or of those that are "routed"."""
    rows = scored("demo_field", "strict").sort_values("average", ascending=False)
    has_parts = rows["method"].isin((*TOLD, *OWN))
    told = has_parts & ((rows["router"] == "oracle") | rows["router"].isna() & ~rows["method"].isin(OWN))
    return rows[{"single": ~has_parts, "told": told, "routed": has_parts & ~told}[kind]]


def at_defaults(rows: pd.DataFrame) -> str:
    def line(row: pd.Series) -> list[str]:
        average = f"{row.average:.1f} ({row.average_low:.1f} to {row.average_high:.1f})"
        worst = f"{row.worst:.1f} {row.worst_task}"
        return [f"`{row.label}`", average, worst, row["data needs"], f"{row.total / 1e6:.0f}"]

    return markdown(["method", "average", "worst task", "data needs", "MB"], [line(row) for _, row in rows.iterrows()])


def demo_single() -> tuple[str, list[str]]:
    """One model for all tasks; the best of them beside Twin-Merging."""
    rows, single = scored("demo_field", "strict").set_index("label"), on_the_demo("single")
    best, text, paper = single.iloc[0], *(rows.loc[f"twin_merging (router={name})"] for name in ("text", "mlp"))
    assert (best.method, best.tier, text.reference) == ("tsv_m", paper.tier, True) and best.difference_low > 0
    lower = single.iloc[2:]
    assert (lower["difference_low"] < 0).all() and (lower["tier"] > paper.tier).all()
    said = [
        f"TSV-M keeps {best.average:.1f} as one model of {best.total / 1e6:.0f} MB, without parts or a router. "
        f"Twin-Merging keeps {paper.average:.1f} with the paper's router and {text.average:.1f} with the text router",
        f"TSV-M's difference to the latter is {best.difference:+.1f} ({best.difference_low:+.1f} to "
        f"{best.difference_high:+.1f})",
        f"on the held-out rows alone keeps {rows.loc['multitask', 'average']:.1f}",
        f"TSV-M keeps {best.average:.1f}",  # in README.md
    ]
    return at_defaults(single), said


def demo_told() -> tuple[str, list[str]]:
    rows = on_the_demo("told")
    first = rows[rows["tier"] == 1]
    assert len(first) == 8 and "twin_merging" in first["method"].tolist()
    return at_defaults(rows), [f"from {first['total'].min() / 1e6:.0f} MB to {first['total'].max() / 1e6:.0f} MB"]


def demo_routed() -> tuple[str, list[str]]:
    return at_defaults(on_the_demo("routed")), []


FIELD = single_models, told_the_task, own_routes, demo_single, demo_told, demo_routed
