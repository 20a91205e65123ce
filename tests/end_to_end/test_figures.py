"""Figures in the prose of README.md and results/README.md follow from committed reports."""

import re
from functools import cache

import pandas as pd
import pytest

from support.commands import ROOT

REPORTS = ROOT / "results" / "reference" / "reports"
FILES = ("README.md", "results/README.md")
FIGURE = r"\d+\.\d+|\d+ (?:MB|points|times)"
TOLD = r"Python 3\.11"  # no figure
TWIN = "twin_merging (shared.method=task_arithmetic, router={})"


@cache
def table(report: str, name: str) -> pd.DataFrame:
    frame = pd.read_csv(REPORTS / report / f"{name}.csv")
    return frame.set_index("task" if "expert is" in frame else "method")


def score(report: str, method: str, column: str = "average", name: str = "strict_normalized") -> str:
    return f"{table(report, name).loc[method, column]:.1f}"


def size(report: str, method: str) -> str:
    return f"{table(report, 'strict_storage').loc[method, 'total'] / 1e6:.0f} MB"


def behind(report: str, method: str, sign: int = -1, form: str = ".1f") -> tuple[str, str]:
    """A row's difference to the reference with its interval; sign -1: how far it is behind."""
    line = table(report, "strict_normalized").loc[method]
    low, high = sorted(sign * line[f"difference_{end}"] for end in ("low", "high"))
    return f"{sign * line['difference']:{form}}", f"{low:{form}} to {high:{form}}"


def pooler_costs() -> list[float]:
    """What merging the pooler costs each static merge in the demo."""
    merged, kept = (
        table("demo_head", file.stem)["average"]
        for file in sorted((REPORTS / "demo_head").glob("strict*_normalized.csv"), key=lambda file: len(file.name))
    )
    return [kept[name] - merged[name] for name in ("average", "task_arithmetic", "ties", "dare", "dare_ties")]


def mpnet_experts() -> str:
    """Each expert of glue_mpnet on its held-out rows."""
    names = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI"}
    names |= {"qnli": "QNLI", "rte": "RTE"}
    points = table("glue_mpnet_select", "strict_validation_bfloat16_living")["score"]
    assert (table("glue_mpnet_select", "strict_validation_bfloat16_living")["expert is"] == "alive").all()
    told = (f"{name} {points[task]:.1f}{' (Matthews)' if task == 'cola' else ''}" for task, name in names.items())
    return f"{', '.join(told)} points"


def sentences() -> list[str]:
    """The pieces of prose in results/README.md that hold figures, with what the reports give in their place."""
    bare = TWIN.format("mlp").replace("task_arithmetic", "pretrained")
    ties, shared = behind("demo", "ties"), behind("demo", bare, 1, "+.1f")
    corrected = [score("demo", name, "corrected") for name in ("regmean", "ties", "task_arithmetic", "pretrained")]
    costs = pooler_costs()
    return [
        f"above TIES by {ties[0]} points ({ties[1]})",
        f"in {size('demo', TWIN.format('oracle'))} for their {size('demo', 'individual')}",
        f"with its router keeps {score('demo', TWIN.format('mlp'), 'corrected')} of the experts' lead over the "
        "best constant answers, RegMean {}, TIES {}, Task Arithmetic {}, the unmerged base {}".format(*corrected),
        f"the difference is {shared[0]} ({shared[1]})",
        mpnet_experts(),
        f"worth {min(costs):.0f} to {max(costs):.0f} points to a static merge",
        f"the majority class ({score('glue_minilm', 'rte', 'score', 'strict_living')})",
        f"with {score('glue_minilm', 'cola', 'score', 'strict_living')} Matthews",
    ]


def prose(file: str) -> str:
    """A file without code, tables, what is told of no measurement, and line breaks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / file).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\|.*$|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.MULTILINE)
    return re.sub(TOLD, "", " ".join(text.split()))


def test_the_figures_of_the_results_are_those_of_the_reports():
    text = prose("results/README.md")
    for sentence in sentences():
        assert sentence in text, f"results/README.md should say: {sentence}"


@pytest.mark.parametrize("file", FILES)
def test_it_has_no_figure_that_no_report_gives(file):
    text = prose(file)
    for sentence in sentences():
        text = text.replace(sentence, "")
    left = [text[max(0, found.start() - 60) : found.end() + 20] for found in re.finditer(FIGURE, text)]
    assert not left, left


def test_the_table_of_settings_has_the_best_of_each_method_on_held_out_rows():
    frame = table("glue_mpnet_select", "strict_validation_bfloat16_normalized").reset_index()
    frame["kind"] = frame["method"].str.partition(" ")[0]
    best = frame.loc[frame.groupby("kind")["average"].idxmax()].sort_values("average", ascending=False)
    lines = [
        f"| {row.method} | {row.average:.1f} | {row.corrected:.1f} | {row.worst:.1f} {row.worst_task} |"
        for row in best.itertuples()
    ]
    head = "| method | average | chance-corrected | worst task |\n| --- | ---: | ---: | ---: |\n"
    assert head + "\n".join(lines) in (ROOT / "results/README.md").read_text(encoding="utf-8")


def test_the_table_of_two_sets_of_experts_is_that_of_their_reports():
    first, second = (table(report, "strict_normalized") for report in ("demo", "demo_second"))
    for method, row in first.iterrows():
        other = second.loc[method, "average"]
        cells = f"{row.average:.1f} | {row.average_low:.1f} to {row.average_high:.1f} | {other:.1f}"
        line = f"| {method} | {cells} | {other - row.average:+.1f} |"
        assert line in (ROOT / "results/README.md").read_text(encoding="utf-8"), line
