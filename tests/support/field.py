"""The tables and figures of results/README.md on the field of 2026, as its committed reports give them."""

import itertools
import math
from functools import cache

import numpy as np
import pandas as pd
import yaml

from support.ablations import drawn
from support.commands import ROOT
from support.reports import REPORTS, markdown, table
from twinbench.records import store
from twinbench.report import bootstrap

TOLD = "twin_merging", "tsv_c", "auto_switch", "t_switch", "tall_masks", "emr", "free"  # here told the task of a row
OWN = "esm_pp", "smile", "mass"  # pick parts by themselves
BOUNDS = "individual", "pretrained"
TUNED = "glue_minilm_field_tuned"
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
    tuned, usual = as_published(single), as_published(single, "default")
    gains = (rows["average"] - rows["default"]).map("{:.1f}".format)
    said = [
        f"{len(single)} of them are one model",
        f"The rank correlation with our tuned rows is {tuned}, with our defaults {usual}",
        f"WUDI gains {gains.wudi} points by its settings, DARE-TIES {gains.dare_ties}, PCB {gains.pcb}, SMILE "
        f"{gains.smile} and Breadcrumbs {gains.breadcrumbs}, TSV-M {gains.tsv_m} and CART {gains.cart}",
    ]
    return leaderboard(single), said


def correlation(ours: pd.Series, theirs: pd.Series) -> float:
    """Spearman's rank correlation."""
    return float(np.corrcoef(ours.rank(), theirs.rank())[0, 1])


def agreement(ours: pd.Series, theirs: pd.Series) -> str:
    """Spearman's rank correlation, with the share of all orders that agree or disagree as much."""
    one, other = (side.rank().to_numpy() for side in (ours, theirs))
    found = correlation(ours, theirs)
    chance = [np.corrcoef(order, other)[0, 1] for order in itertools.permutations(one)]
    return f"{found:.2f} (p = {np.mean(np.abs(chance) >= abs(found) - 1e-9):.3f})"


def as_published(single: pd.DataFrame, column: str = "average") -> str:
    """How the order of seven data-free merges agrees with the one that ESM's authors published."""
    theirs = (
        pd.read_csv(ROOT / "results/literature/glue.csv").query("source == @PUBLISHED").set_index("method")["value"]
    )
    both = single.loc[(single["data needs"] == "nothing") & single.index.isin(theirs.index), column]
    assert len(both) == 7
    return agreement(both, theirs[both.index])


def told_the_task() -> tuple[str, list[str]]:
    return leaderboard(searched().loc[lambda rows: rows.index.isin(TOLD)]), []


def own_routes() -> tuple[str, list[str]]:
    return leaderboard(searched().loc[lambda rows: rows.index.isin(OWN)]), []


def of_kind(kind: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Of rows those of "single" models, of methods "told" the task, or of those that are "routed"; the best first."""
    has_parts = rows["method"].isin((*TOLD, *OWN))
    told = has_parts & ((rows["router"] == "oracle") | rows["router"].isna() & ~rows["method"].isin(OWN))
    asked = {"single": ~has_parts, "told": told, "routed": has_parts & ~told}[kind]
    return rows[asked].sort_values("average", ascending=False)


def on_the_demo(kind: str) -> pd.DataFrame:
    """The demo's rows, every method at its defaults."""
    return of_kind(kind, scored("demo_field", "strict"))


def on_glue(kind: str) -> pd.DataFrame:
    """GLUE's test rows, every method at the setting that held-out rows chose, with its average at its defaults."""
    rows = of_kind(kind, scored(TUNED, "strict"))
    return rows.assign(default=[on_glue_at_defaults(*each) for each in zip(rows.label, rows.average, strict=True)])


def on_glue_at_defaults(label: str, average: float) -> float:
    """What a method with its router keeps of GLUE's test rows at its defaults; NaN where that is not run."""
    method, _, said = label.partition(" ")
    if not changed(label):
        return average
    rows = scored("glue_minilm_field", "strict")
    rows = rows[(rows["method"] == method) & rows["usual"]]
    router = said.removeprefix("(router=").removesuffix(")")
    # A row that names no setting is the method's only one, so it is the chosen one: the default is not run.
    same = [row.average for row in rows.itertuples() if settings(row.label) and (row.router == router or not said)]
    return same[0] if same else math.nan


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


def held_out() -> pd.DataFrame:
    """By method its best setting on GLUE's held-out rows, of both rounds: ``params`` and ``average`` (living tasks)."""
    rows = pd.DataFrame(store.read(REPORTS.parent)).query("status == 'ok' and primary")
    rows = rows[rows["experiment"].isin((SEARCH, SEARCH.replace("select", "edges")))]
    scores = rows.pivot(index="run_id", columns="task", values="value").drop(columns="rte")  # its expert is dead
    runs = rows.drop_duplicates("run_id").set_index("run_id")
    (experts,) = runs.index[runs["method"] == "individual"]
    runs["average"] = (scores / scores.loc[experts]).mean(axis=1)
    return runs.loc[runs.groupby("method")["average"].idxmax()].set_index("method")[["params", "average"]]


@cache  # each line of a table asks
def scored_settings() -> dict[str, list[dict]]:
    """By method the settings that GLUE's test rows were scored at as the chosen ones."""
    found: dict[str, list[dict]] = {}
    for row in store.read(REPORTS.parent):
        if row["experiment"] == TUNED and row["params"] not in found.setdefault(row["method"], []):
            found[row["method"]].append(row["params"])
    return found


@cache
def own_router(method: str) -> dict:
    """The settings of the router that a method brings along, at which GLUE's test rows were scored."""
    rows = (row for row in store.read(REPORTS.parent) if row["experiment"] == TUNED and row["method"] == method)
    return next(row["router"] for row in rows if row["router"] and row["router"]["name"] == method)


def changed(label: str) -> str:
    """Where the setting that GLUE's test rows were scored at is not the default of the method, or of its own router."""
    method = label.partition(" ")[0]
    (params,) = scored_settings()[method]
    own = {key: value for key, value in params.items() if key not in ("shared", "compression")}
    usual = defaults("method", method)
    if f"router={method})" in label:
        features = defaults("router", method)["features"]
        own |= {f"router.{key}": own_router(method)[key] for key in features}
        usual = usual | {f"router.{key}": value for key, value in features.items()}
    return ", ".join(f"{key}={value}" for key, value in own.items() if number(value) != number(usual[key]))


def on_test_rows(rows: pd.DataFrame) -> str:
    """The table of some of GLUE's test rows, a line each; with what the methods keep at their defaults."""

    def line(row: pd.Series) -> list[str]:
        average = f"{row.average:.1f} ({row.average_low:.1f} to {row.average_high:.1f})"
        worst = f"{row.worst:.1f} {row.worst_task}"
        default = "not run" if math.isnan(row.default) else f"{row.default:.1f}"
        cells = [f"`{row.label}`", changed(row.label), average, default, worst, f"{row.tier:.0f}"]
        return [*cells, row["data needs"], f"{row.total / 1e6:.0f}"]

    heads = ["method", "what is not a default", "average", "at its defaults", "worst task", "tier", "data needs", "MB"]
    return markdown(heads, [line(row) for _, row in rows.iterrows()])


def lead(one: str, other: str) -> str:
    """On GLUE's test rows, the points between two rows' averages over living tasks, with the paired interval."""
    block, draws = drawn(TUNED, one, other)
    columns = [column for column in block.columns if column[0] != "rte"]
    low, high, _ = bootstrap.paired(
        *(bootstrap.averages(block.find(row).runs, block.individual, columns, draws) for row in (one, other))
    )
    averages = table(TUNED, "strict_normalized")["average"]
    return f"{averages[one] - averages[other]:+.1f} ({low:+.1f} to {high:+.1f})"


def glue_single() -> tuple[str, list[str]]:
    """One model for all tasks, at the setting that held-out rows chose; the best of them beside Twin-Merging."""
    single, rows = on_glue("single").set_index("method", drop=False), scored(TUNED, "strict")
    text, paper = (rows.set_index("label").loc[f"twin_merging (router={name})"] for name in ("text", "mlp"))
    assert text.reference and (single["difference_high"] < 0).all() and (single["p"] < 0.05).all()
    best, second = single.iloc[0], single.iloc[1]
    assert best.method == "tsv_m" and best.tier == paper.tier < second.tier and len(rows["method"].unique()) == 36
    beside = lead("twin_merging (router=mlp)", "tsv_m")
    gains = (single["average"] - single["default"]).map("{:.1f}".format)
    again = correlation(single["average"], held_out().loc[single.index, "average"])
    said = [
        f"TSV-M keeps {best.average:.1f} in {best.total / 1e6:.0f} MB, Twin-Merging {text.average:.1f} with the text "
        f"router in {text.total / 1e6:.0f} MB and {paper.average:.1f} with the paper's in {paper.total / 1e6:.0f} MB",
        f"TSV-M's difference to the text router is {best.difference:+.1f} ({best.difference_low:+.1f} to "
        f"{best.difference_high:+.1f})",
        f"The paper's router has {beside} points more",
        f"Its worst task keeps {best.worst:.1f}, Twin-Merging's {text.worst:.1f} with the text router and "
        f"{paper.worst:.1f} with the paper's. Corrected for chance TSV-M keeps {best.corrected:.1f}, the paper's "
        f"router {paper.corrected:.1f}, the text router {text.corrected:.1f}",
        f"The rank correlation of seven data-free merges with their published order is {as_published(single)}",
        f"with the order of all {len(single)} on held-out rows it is {again:.2f}",
        f"At their defaults it is {as_published(single, 'default')}",
        f"WUDI gains {gains.wudi} points by its settings, DARE-TIES {gains.dare_ties}, PCB {gains.pcb}, Breadcrumbs "
        f"{gains.breadcrumbs}, ESM {gains.esm}, FR {gains.fr} and Iso-CTS {gains.iso_cts}",
        f"TSV-M keeps {single.default['tsv_m']:.1f} at its defaults, too",
    ]
    return on_test_rows(single), said


def glue_told() -> tuple[str, list[str]]:
    """Methods that are told the task of each row."""
    rows = on_glue("told")
    first, last = rows[rows["tier"] == 1], rows.iloc[-1]
    assert (len(rows), len(first), last.method, rows.iloc[0].method) == (10, 9, "free", "esm_pp")
    sizes = first["total"] / 1e6
    return on_test_rows(rows), [f"from {sizes.min():.0f} MB to {sizes.max():.0f} MB; FREE keeps {last.average:.1f}"]


def glue_routed() -> tuple[str, list[str]]:
    """Methods whose router finds the task; what they lose to its choice, and what to their parts."""
    rows, lost = on_glue("routed"), table(TUNED, "strict_losses")
    (behind,) = rows[rows["label"] == "auto_switch (router=text)"].to_dict("records")

    def line(label: str) -> str:
        row = lost.loc[label]
        return f"{row['lost to the route']:.1f} points to the route and {row['lost to the parts']:.1f} to the parts"

    said = [
        f"ESM++ loses {line('esm_pp (router=none)')}, MASS {line('mass (router=mass)')}, SMILE "
        f"{line('smile (router=none)')}",
        f"MASS' route is right for {table(TUNED, 'strict_router').average['mass (router=mass)']:.1f} %",
        f"Auto-Switch keeps {behind['average']:.1f} in {behind['total'] / 1e6:.0f} MB, {-behind['difference']:.1f} "
        f"points less than Twin-Merging ({-behind['difference_high']:.1f} to {-behind['difference_low']:.1f})",
    ]
    return on_test_rows(rows), said


FIELD = single_models, told_the_task, own_routes, demo_single, demo_told, demo_routed
FIELD += glue_single, glue_told, glue_routed
