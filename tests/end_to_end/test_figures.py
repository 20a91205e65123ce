"""Figures in the prose of README.md and results/README.md follow from committed reports."""

import re
from functools import cache, partial

import pandas as pd
import pytest

from support.ablations import ABLATIONS
from support.commands import ROOT
from support.field import FIELD, held_out, scored_settings
from support.generative import GENERATIVE
from support.reports import REPORTS, TWIN, heads, kept, table
from twinbench.records import store

FILES = ("README.md", "results/README.md")
FIGURE = r"\d+\.\d+|\d+ (?:MB|points|times)"
TOLD = r"Python 3\.11|At most 0\.3 points were wanted"  # no figure, and an aim
MPNET = "glue_mpnet", "strict_bfloat16_normalized"
MINILM = "glue_minilm", "strict_bfloat16_normalized"
on_mpnet, on_minilm = (partial(kept, report=where[0], name=where[1]) for where in (MPNET, MINILM))
TASKS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI"}
TASKS |= {"qnli": "QNLI", "rte": "RTE"}


def score(report: str, method: str, column: str = "average", name: str = "strict_normalized") -> str:
    return f"{table(report, name).loc[method, column]:.1f}"


def size(report: str, method: str) -> str:
    return f"{table(report, 'strict_storage').loc[method, 'total'] / 1e6:.0f} MB"


def behind(
    report: str, method: str, sign: int = -1, form: str = ".1f", name: str = "strict_normalized"
) -> tuple[str, str]:
    """A row's difference to the reference with its interval; sign -1: how far it is behind."""
    line = table(report, name).loc[method]
    low, high = sorted(sign * line[f"difference_{end}"] for end in ("low", "high"))
    return f"{sign * line['difference']:{form}}", f"{low:{form}} to {high:{form}}"


def pooler_costs() -> list[float]:
    """What merging the pooler costs each static merge in the demo."""
    merged, kept = (scores["average"] for scores in heads())
    return [kept[name] - merged[name] for name in ("average", "task_arithmetic", "ties", "dare", "dare_ties")]


def mpnet_experts(report: str, name: str) -> str:
    """Each expert of glue_mpnet, all of them alive."""
    found = table(report, name)
    assert (found["expert is"] == "alive").all()
    told = (
        f"{said} {found['score'][task]:.1f}{' (Matthews)' if task == 'cola' else ''}" for task, said in TASKS.items()
    )
    return f"{', '.join(told)} points"


def found_of_stsb(run_id: str) -> dict[str, float]:
    """Of STS-B's first 1,000 test rows, by their source, how many percent a run sent to STS-B's expert.

    The sources stand in the order captions, forum, news (Cer et al., SemEval 2017).
    """
    rows = store.predictions(REPORTS.parent, run_id)
    rows = rows[(rows["task"] == "stsb") & (rows["split"] == "test")]
    source = pd.cut(rows["row"], [-1, 624, 999], labels=["captions", "forum"])
    return (100 * (rows["route"] == "stsb").groupby(source, observed=True).mean()).to_dict()


def under(protocol: str, method: str) -> str:
    """What a row of glue_mpnet keeps under another protocol than strict."""
    return f"{table('glue_mpnet', f'{protocol}_bfloat16_normalized').loc[method, 'average']:.1f}"


def mpnet() -> list[str]:
    """The pieces of prose on glue_mpnet."""
    text, oracle = TWIN.format("text"), TWIN.format("oracle")
    mlp, more = (TWIN.format(f"mlp, router.rows={rows}") for rows in ("null", 5500))
    line = table(*MPNET).loc[text]
    rest = [line[task] for task in TASKS if task != "stsb"]
    routed = table("glue_mpnet", "strict_bfloat16_router").loc[text, "stsb"]
    paper = behind("glue_mpnet", mlp, name=MPNET[1])
    bare = behind("glue_mpnet", text.replace("task_arithmetic", "pretrained"), 1, "+.1f", MPNET[1])
    total = table("glue_mpnet", "strict_bfloat16_storage")["total"] / 1e6
    curve = table("glue_mpnet", "experts_learning").loc["qqp"].set_index("epoch")["value"]
    source = found_of_stsb("d559c65a3a3f")
    return [
        mpnet_experts("glue_mpnet", "strict_bfloat16_living"),
        f"on held-out rows it scores {100 * curve[1]:.1f} after one epoch of 7,999 rows and {100 * curve[2]:.1f} after "
        "two",
        f"the unmerged base keeps {on_mpnet('pretrained')}, Task Arithmetic {on_mpnet('task_arithmetic')}, "
        f"Twin-Merging with a learned router {on_mpnet(text)}, and with the known task {on_mpnet(oracle)}",
        f"The plain average keeps {on_mpnet('average')}",
        f"in {total[oracle]:.0f} MB for their {total['individual']:.0f} MB",
        f"It sends {routed:.1f} % of the pairs of STS-B to its expert, and keeps {line['stsb']:.1f} there; over the "
        f"other seven tasks it keeps {sum(rest) / len(rest):.1f}",
        f"It finds {source['captions']:.1f} % of its captions and {source['forum']:.1f} % of its forum pairs",
        f"keeps {on_mpnet(mlp)}, {paper[0]} points less ({paper[1]})",
        f"TALL-masks keeps {on_mpnet('tall_masks')} and EMR {on_mpnet('emr')}",
        f"RegMean keeps {on_mpnet('regmean')}, TIES {on_mpnet('ties')}",
        f"changes the average by {bare[0]} ({bare[1]})",
        f"it keeps {on_mpnet(TWIN.format('risk'))}",
        f"it keeps {on_mpnet(more)}",
        f"keeps {on_mpnet('smile')}",
        f"the experts keep {under('blind', 'individual')}, Twin-Merging {under('blind', 'twin_merging')}, TIES "
        f"{under('blind', 'ties')}, Task Arithmetic {under('blind', 'task_arithmetic')}, the average "
        f"{under('blind', 'average')}",
        f"Twin-Merging keeps {under('paper', 'twin_merging')}, TIES {under('paper', 'ties')}, Task Arithmetic "
        f"{under('paper', 'task_arithmetic')}, the average {under('paper', 'average')}, the base "
        f"{under('paper', 'pretrained')}",
        moved("glue_mpnet_precision"),
    ]


def moved(report: str) -> str:
    """What bfloat16 changes of averages."""
    exact, rough = (table(report, f"strict{kind}_normalized")["average"] for kind in ("", "_bfloat16"))
    by = [f"{rough[name] - exact[name]:+.2f}" for name in ("average", "ties", "twin_merging")]
    return "in place of float32 it moves the plain average by {} points, TIES by {}, Twin-Merging by {}".format(*by)


def minilm() -> list[str]:
    """The pieces of prose on glue_minilm."""
    alive = table("glue_minilm", "strict_bfloat16_living")
    (dead,) = alive.index[alive["expert is"] == "dead"]
    told = ", ".join(f"{name} {alive['score'][task]:.1f}" for task, name in TASKS.items() if task != dead)
    text, rows = TWIN.format("text").replace("(", "(rank_ratio=0.1, "), table(*MINILM)
    line = rows.loc[text]
    rest = [line[task] for task in TASKS if task not in ("stsb", dead)]
    bare = behind("glue_minilm", text.replace("task_arithmetic", "pretrained"), 1, "+.1f", MINILM[1])
    return [
        f"in points: {told}",
        f"{TASKS[dead]}'s scores {alive['score'][dead]:.1f} where the best constant answer has "
        f"{alive['best constant'][dead]:.1f}",
        f"the unmerged base keeps {on_minilm('pretrained')}, Task Arithmetic {on_minilm('task_arithmetic')}, "
        f"Twin-Merging with a learned router {on_minilm(text)}, and with the known task "
        f"{on_minilm(text.replace('text', 'oracle'))}",
        f"The plain average keeps {on_minilm('average')}, above the base here",
        f"it keeps {on_minilm(text.replace('text', 'risk'))}",
        f"keeps {on_minilm(text.replace('text', 'mlp, router.rows=null'))} on held-out rows and "
        f"{on_minilm(text.replace('text', 'mlp, router.rows=5500'))} on its code's 5,500",
        f"TALL-masks keeps {on_minilm('tall_masks')} and EMR {on_minilm('emr')}",
        f"RegMean keeps {on_minilm('regmean')}, SMILE {on_minilm('smile')}, DARE {on_minilm('dare')}",
        f"keeps {line['stsb']:.1f} on STS-B and {sum(rest) / len(rest):.1f} on the other living tasks",
        f"moves the average by {bare[0]} ({bare[1]})",
        moved("glue_minilm_precision"),
    ]


@cache  # some draw 10,000 samples
def made(ablation) -> tuple[str, list[str]]:
    return ablation()


@cache
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
        *mpnet(),
        *minilm(),
        *(sentence for ablation in ABLATIONS + FIELD + GENERATIVE for sentence in made(ablation)[1]),
        mpnet_experts("glue_mpnet_select", "strict_validation_bfloat16_living"),
        f"worth {min(costs):.0f} to {max(costs):.0f} points to a static merge",
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


def test_the_readmes_table_of_glue_is_of_its_report():
    rows, total = table(*MPNET), table("glue_mpnet", "strict_bfloat16_storage")["total"] / 1e6
    lines = [
        f"|{name}|{row.average:.1f}|{row.average_low:.1f} to {row.average_high:.1f}|{total[name]:.0f}|"
        for name, row in rows.iterrows()
    ]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text[text.index("|average on GLUE|") :].split("\n\n")[0].splitlines()[2:]
    assert shown == [line for line in lines if line in shown] and len(shown) > 9
    assert lines[0] in shown and lines[-1] in shown, "the bounds"


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


@pytest.mark.parametrize("ablation", ABLATIONS + FIELD + GENERATIVE, ids=lambda ablation: ablation.__name__)
def test_the_table_of_an_ablation_is_that_of_its_report(ablation):
    assert made(ablation)[0] in (ROOT / "results/README.md").read_text(encoding="utf-8")


def test_the_tuned_field_is_scored_at_the_settings_that_held_out_rows_chose():
    best = {method: [settings] for method, settings in held_out()["params"].items()}
    assert scored_settings() == best


def test_the_table_of_two_sets_of_experts_is_that_of_their_reports():
    first, second = (table(report, "strict_normalized") for report in ("demo", "demo_second"))
    for method, row in first.iterrows():
        other = second.loc[method, "average"]
        cells = f"{row.average:.1f} | {row.average_low:.1f} to {row.average_high:.1f} | {other:.1f}"
        line = f"| {method} | {cells} | {other - row.average:+.1f} |"
        assert line in (ROOT / "results/README.md").read_text(encoding="utf-8"), line
