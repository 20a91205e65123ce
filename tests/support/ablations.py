"""The tables and figures of results/README.md on single questions, as their committed reports give them."""

import itertools
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd

from support.commands import ROOT
from support.reports import REPORTS, TWIN, kept, markdown, table
from twinbench.records import store
from twinbench.report import blocks, bootstrap, read

NAME = "strict_bfloat16_normalized"
UNSEEN = {"sick": "SICK", "trec": "TREC", "ag_news": "AG News"}


def compression() -> tuple[str, list[str]]:
    """Score by rank, with a shared expert and without; pruning in the place of a low rank."""
    report = "glue_minilm_compression"
    size, gain = (table(report, f"strict_bfloat16_{name}") for name in ("storage", "shared"))

    def row(rank: str, shared: str, router: str) -> str:
        return f"twin_merging (compression=svd, rank_ratio={rank}, method@shared={shared}, router={router})"

    def line(rank: str) -> list[str]:
        first = row(rank, "task_arithmetic", "oracle")
        more = gain.loc[first]
        cells = [kept(row(rank, shared, "oracle"), report, NAME) for shared in ("task_arithmetic", "pretrained")]
        cells.append(f"{more.average:+.1f} ({more.average_low:+.1f} to {more.average_high:+.1f})")
        routed = [row(rank, shared, "text") for shared in ("task_arithmetic", "pretrained")]
        cells += [f"{table(report, NAME).loc[name, 'average']:.1f}" for name in routed]
        return [f"{rank}", f"{size.loc[first, 'total'] / 1e6:.0f}", *cells]

    heads = ["rank ratio", "MB", "shared expert", "none", "what it adds", "shared expert, routed", "none, routed"]
    pruned = "twin_merging (compression={}, density=0.15, method@shared=task_arithmetic, router=oracle)"
    magnitude, bernoulli = (pruned.format(kind) for kind in ("magnitude", "bernoulli"))
    said = (
        f"random pruning keeps {kept(bernoulli, report, NAME)} and pruning by magnitude "
        f"{kept(magnitude, report, NAME)}, in {size.loc[bernoulli, 'total'] / 1e6:.0f} MB"
    )
    return markdown(heads, [line(rank) for rank in ("0.1", "0.05", "0.02", "0.003")]), [said]


def shared() -> tuple[str, list[str]]:
    """What other mergers are worth as shared experts, alone and under the exclusive parts."""
    report = "glue_minilm_shared"
    rows = table(report, NAME)

    def line(method: str) -> list[str]:
        whole = f"twin_merging (method@shared={method})"
        alone = kept(method, report, NAME) if method in rows.index else ""
        apart = rows.loc[whole]
        gap = f"{apart.difference:+.1f} ({apart.difference_low:+.1f} to {apart.difference_high:+.1f})"
        return [f"`{method}`", alone, kept(whole, report, NAME), "" if apart.reference else gap]

    heads = ["shared expert", "alone", "with the exclusive parts", "difference to Task Arithmetic's"]
    return markdown(heads, [line(name) for name in ("task_arithmetic", "ties", "average", "pretrained", "expert")]), []


def protocols() -> tuple[str, list[str]]:
    """What the gold task id is worth."""
    report, names = "glue_minilm_protocols", ("paper", "strict", "blind")
    found = {name: table(report, f"{name}_bfloat16_normalized") for name in names}

    def cell(method: str, protocol: str) -> str:
        return kept(method, report, f"{protocol}_bfloat16_normalized") if method in found[protocol].index else ""

    rows = ("individual", "twin_merging", "task_arithmetic", "ties", "pretrained")
    lines = [[f"`{method}`", *(cell(method, protocol) for protocol in names)] for method in rows]
    strict, blind = ([found[name].loc[row, "stsb"] for row in ("twin_merging", rows[2])] for name in names[1:])
    said = (
        f"On STS-B Twin-Merging rises from {strict[0]:.1f} to {blind[0]:.1f}, and Task Arithmetic falls from "
        f"{strict[1]:.1f} to {blind[1]:.1f}"
    )
    return markdown(["method", *(f"`protocol={name}`" for name in names)], lines), [said]


def router() -> tuple[str, list[str]]:
    """What a router reads, from how many rows, and how its weights are used."""
    report, text, mlp = "glue_minilm_router", "2048 9000 1", "shared null mean null"
    found = table(report, NAME)
    right = table(report, "strict_bfloat16_router")["average"]

    def named(kind: str, values: str) -> str:
        keys = {"text": "source characters rows top_k", "mlp": "source layer pool rows"}[kind].split()
        said = ", ".join(f"router.{key}={value}" for key, value in zip(keys, values.split(), strict=True))
        return f"twin_merging (router={kind}, {said})"

    rows = {
        "the known task": "twin_merging (router=oracle)",
        "`text`: an early layer of the base, and characters": named("text", f"base {text}"),
        "· with mixed weights": named("text", "base 2048 9000 null"),
        "· characters alone": named("text", f"null {text}"),
        "· hidden states alone": named("text", "base 0 9000 1"),
        "· 1,000 training rows a task": named("text", "base 2048 1000 1"),
        "· 300": named("text", "base 2048 300 1"),
        "`mlp`, the paper's: the shared expert's last layer, held-out rows": named("mlp", mlp),
        "· 5,500 training rows a task, as in its code": named("mlp", "shared null mean 5500"),
        "· 1,000": named("mlp", "shared null mean 1000"),
        "· the base's last layer": named("mlp", "base null mean null"),
        "· layer 2": named("mlp", "shared 2 mean null"),
        "· the first token": named("mlp", "shared null first null"),
    }

    def line(words: str, label: str) -> list[str]:
        row = found.loc[label]
        gap = f"{row.difference:+.1f} ({row.difference_low:+.1f} to {row.difference_high:+.1f})"
        hits = f"{right[label]:.1f}" if label in right else ""
        return [words, kept(label, report, NAME), "" if row.reference else gap, hits]

    heads = ["router", "average", "difference to `text`", "right routes, %"]
    (grouped,) = table(report, "strict_bfloat16_adapted_normalized")["average"]
    first, second = (found.loc[rows[name], "average"] for name in list(rows)[7:12:4])
    said = [
        f"the paper's router rises from {first:.1f} to {second:.1f} where it reads layer 2",
        f"it keeps {grouped:.1f}",
    ]
    return markdown(heads, [line(*row) for row in rows.items()]), said


def tasks() -> tuple[str, list[str]]:
    """Scores by the number of merged tasks, in three orders."""
    report = "glue_minilm_tasks"
    rows = table(report, "tasks_glue_minilm_sick_strict_bfloat16_tasks")
    counts = ("2 tasks", "4 tasks", "6 tasks", "8 tasks")

    def cell(method: str, count: str) -> str:
        row = rows.loc[method]
        ends = row[f"{count}_low"], row[f"{count}_high"]
        return f"{row[count]:.1f}" + (f" ({ends[0]:.1f} to {ends[1]:.1f})" if np.isfinite(ends).all() else "")

    methods = ("twin_merging", "task_arithmetic", "ties", "pretrained")
    lines = [[f"`{method}`", *(cell(method, count) for count in counts)] for method in methods]
    found = [
        pd.read_csv(path).set_index("method") for path in sorted((REPORTS / report).glob("strict_*normalized.csv"))
    ]
    below = sum(scores.loc[["task_arithmetic", "ties"], "difference_high"].max() < 0 for scores in found)
    lost = [scores for scores in found if scores.loc["individual", "difference_low"] > 0]
    both = [scores for scores in found if {"stsb", "mnli"} <= {*scores.columns}]
    assert len(lost) == len(both) and all(one is other for one, other in zip(lost, both, strict=True))
    shares = sorted(scores.loc["twin_merging", "average"] for scores in both)
    least, most = (rows.loc["task_arithmetic", f"4 tasks_{end}"] for end in ("low", "high"))
    said = [
        f"the {len(both)} sets that hold both keep {shares[0]:.1f}, {shares[1]:.1f} and {shares[2]:.1f}",
        f"In {below} of the {len(found)} sets Twin-Merging is above Task Arithmetic and TIES",
        f"of four tasks Task Arithmetic keeps {least:.1f} in one set and {most:.1f} in another",
    ]
    return markdown(["method", *counts], lines), said


def shared_by_rank() -> tuple[str, list[str]]:
    """What a shared expert adds by rank, for experts trained in two ways, and what truncation leaves out."""
    report, suite_id = "shared_expert", "7f2ed7a3fd3f"
    ways = {"short and hard": ("shared_short", f"{suite_id}_"), "long and gently": ("shared_long", "")}
    ranks = {1: "0.003", 2: "0.006", 4: "0.011", 8: "0.021", 16: "0.042", 38: "0.1"}
    kinds = ("pretrained", "average", "task_arithmetic")
    tails = json.loads((ROOT / "results/studies/tail_energy.json").read_text(encoding="utf-8"))
    name = "twin_merging (rank_ratio={}, method@shared={})".format

    def line(way: str, rank: int) -> list[str]:
        suite, mark = ways[way]
        scores = table(report, f"strict_bfloat16_{mark}normalized")["average"]
        gap = table(report, f"strict_bfloat16_{mark}shared").loc[name(ranks[rank], "task_arithmetic")]
        adds = f"{gap.average:+.1f} ({gap.average_low:+.1f} to {gap.average_high:+.1f})"
        left = " / ".join(f"{tails[suite][kind][ranks[rank]]:.0f}" for kind in kinds)
        return [way, f"{rank}", *(f"{scores[name(ranks[rank], kind)]:.1f}" for kind in kinds), adds, left]

    def shown(way: str, kind: str) -> int:
        """The largest rank up to which it is shown that such a shared expert adds something."""
        more = table(report, f"strict_bfloat16_{ways[way][1]}shared")
        lines = [(rank, more.loc[name(ratio, kind)]) for rank, ratio in ranks.items()]
        helps = itertools.takewhile(lambda line: line[1].p < 0.05 and line[1].average > 0, lines)
        return max(rank for rank, _ in helps)

    def less(kind: str) -> list[float]:
        return [
            100 * (1 - of[kind][ratio] / of["pretrained"][ratio]) for of in tails.values() for ratio in ranks.values()
        ]

    up_to = {kind: [shown(way, kind) for way in ways] for kind in kinds[1:]}
    task, plain = up_to["task_arithmetic"], up_to["average"]
    saved = less("average")
    said = [
        f"Task Arithmetic's is shown to help up to rank {task[0]} of experts trained short and hard, and up to rank "
        f"{task[1]} of the others; the plain average up to rank {plain[0]} and {plain[1]}",
        f"{min(saved):.0f} to {max(saved):.0f} % less is left out with the plain average than with none",
    ]
    heads = ["experts trained", "rank", "none", "plain average", "Task Arithmetic", "Task Arithmetic adds"]
    return markdown([*heads, "left out, %"], [line(way, rank) for way in ways for rank in ranks]), said


def combined() -> tuple[str, list[str]]:
    """Static merges as shared experts, on held-out rows: alone, and under exclusive parts of three ranks."""
    report, name = "glue_minilm_combination_select", "strict_validation_bfloat16_normalized"
    rows = table(report, name)
    ranks = {1: "0.003", 8: "0.021", 38: "0.1"}
    kinds = ("tsv_m", "cart", "esm", "iso_c", "wudi", "ace", "regmean", "task_arithmetic", "average", "pretrained")
    assert [label for label in rows.index if label in kinds] == list(kinds), "the best alone first"

    def row(rank: int, kind: str) -> pd.Series:
        return rows.loc[f"twin_merging (rank_ratio={ranks[rank]}, method@shared={kind})"]

    def line(kind: str) -> list[str]:
        first = row(1, kind)
        gap = f"{first.difference:+.1f} ({first.difference_low:+.1f} to {first.difference_high:+.1f})"
        cells = [f"{rows.loc[kind, 'average']:.1f}", *(f"{row(rank, kind).average:.1f}" for rank in ranks)]
        return [f"`{kind}`", *cells, "" if first.reference else gap]

    best = {rank: max(kinds, key=lambda kind: row(rank, kind).average) for rank in ranks}
    assert best == {1: "wudi", 8: "average", 38: "cart"}
    alone, under = (f"{value:.1f}" for value in (rows.loc["tsv_m", "average"], row(1, "tsv_m").average))
    task = f"{rows.loc['task_arithmetic', 'average']:.1f}", f"{row(1, 'task_arithmetic').average:.1f}"
    said = [
        f"TSV-M keeps {alone} alone and {under} with a direction of each expert beside it, Task Arithmetic {task[0]} "
        f"and {task[1]}"
    ]
    heads = ["shared expert", "alone", "rank 1", "rank 8", "rank 38", "rank 1, difference to Task Arithmetic's"]
    return markdown(heads, [line(kind) for kind in kinds]), said


def combined_on_test() -> tuple[str, list[str]]:
    """The shared experts that were best on held-out rows, on test rows, beside none and Task Arithmetic's."""
    report = "glue_minilm_combination"
    best = {"1": ("0.003", "wudi"), "8": ("0.021", "average"), "38": ("0.1", "cart")}
    living = table(report, "strict_living")
    alive = [task for task in living.index if living["expert is"][task] == "alive"]
    more, size = (table(report, f"strict_{name}") for name in ("shared", "storage"))

    def label(ratio: str, kind: str) -> str:
        return f"twin_merging (rank_ratio={ratio}, method@shared={kind})"

    def adds(row: str) -> str:
        return f"{more.average[row]:+.1f} ({more.average_low[row]:+.1f} to {more.average_high[row]:+.1f})"

    def bytes_of(ratio: str, kind: str) -> str:
        return f"{size.total[label(ratio, kind)] / 1e6:.0f} MB"

    def lines(rank: str) -> list[list[str]]:
        ratio, chosen = best[rank]
        task, own = label(ratio, "task_arithmetic"), label(ratio, chosen)
        gaps = {own: untouched(report, task, [own], alive)[0]}
        return [
            [
                *(f"{rank}, `{kind}`", kept(row, report, "strict_normalized"), f"{size.total[row] / 1e6:.0f}"),
                *("" if kind == "pretrained" else adds(row), gaps.get(row, "")),
            ]
            for kind in ("pretrained", "task_arithmetic", chosen)
            for row in (label(ratio, kind),)
        ]

    heads = ["directions, shared expert", "average", "MB", "what it adds to none", "difference to Task Arithmetic's"]
    shown = {rank: adds(label(ratio, "task_arithmetic")) for rank, (ratio, _) in best.items()}

    def over_none(kind: str) -> tuple[str, str]:
        row = more.loc[label("0.003", kind)]
        return f"{row.average:.1f} points more", f"({row.average_low:+.1f} to {row.average_high:+.1f})"

    task, wudi = over_none("task_arithmetic"), over_none("wudi")
    said = [
        f"At one direction Task Arithmetic's keeps {task[0]} than none {task[1]}, and WUDI's {wudi[0]} {wudi[1]}",
        f"At eight Task Arithmetic's difference is {shown['8']}, and at 38 {shown['38']}",
        f"CART's at 38 directions takes {bytes_of('0.1', 'cart')}, none there {bytes_of('0.1', 'pretrained')}",
        f"At eight directions Task Arithmetic's takes {bytes_of('0.021', 'task_arithmetic')}, none "
        f"{bytes_of('0.021', 'pretrained')}, the plain average's {bytes_of('0.021', 'average')}",
    ]
    return markdown(heads, [line for rank in best for line in lines(rank)]), said


def unseen() -> tuple[str, list[str]]:
    """Linear probes on merged features, for tasks without an expert."""
    report = "glue_minilm_probe"
    raw, more = table(report, "strict_bfloat16_raw"), table(report, "strict_bfloat16_unseen")
    sets = {f"{name}, {rows} rows": f"{key}_{rows}" for key, name in UNSEEN.items() for rows in (200, 1000)}
    sets |= {"WNLI, 200 rows": "wnli_200"}

    def cell(method: str, column: str) -> str:
        row = more.loc[method]
        clear = row[f"{column}_low"] > 0 or row[f"{column}_high"] < 0
        return f"{row[column]:+.1f}{'*' if clear else ''}"

    def average(method: str) -> str:
        row = more.loc[method]
        return f"{row.average:+.1f} ({row.average_low:+.1f} to {row.average_high:+.1f})"

    base = [raw.loc["pretrained", f"{column} (accuracy)"] for column in sets.values()]
    lines = [["the unmerged base, points", *(f"{value:.1f}" for value in base), ""]]
    methods = ("average", "task_arithmetic", "ties", "twin_merging")
    lines += [[f"`{m}`", *(cell(m, column) for column in sets.values()), average(m)] for m in methods]
    some = ["trec", "ag_news", "wnli"]
    without, twin = gap(report, "average", "pretrained", some), gap(report, "twin_merging", "average", [*some, "sick"])
    said = [
        f"the plain average adds {average('average')} points",
        f"without SICK that is {without}",
        f"Twin-Merging is {twin} from the plain average",
    ]
    return markdown(["features of", *sets, "average"], lines), said


def second() -> tuple[str, list[str]]:
    """The main table's rows with experts of another training seed, over the tasks that are alive in both sets."""
    reports = "glue_minilm", "glue_minilm_second"
    scores = [table(report, NAME) for report in reports]
    alive = [table(report, "strict_bfloat16_living")["expert is"] != "dead" for report in reports]
    tasks = [task for task in alive[0].index if alive[0][task] and alive[1][task]]
    twin = "twin_merging (rank_ratio=0.1, method@shared=task_arithmetic, router={})"
    plain = ("regmean", "smile", "dare", "dare_ties", "task_arithmetic", "ties", "average", "pretrained")
    rows = {twin.format("oracle"): "twin_merging (router=oracle)", "tall_masks": "tall_masks"}
    rows |= {twin.format("text"): "twin_merging (router=text)", "emr": "emr"}
    rows |= {twin.format("mlp, router.rows=null"): "twin_merging (router=mlp)"} | {name: name for name in plain}
    moved = {}

    def line(first: str, name: str) -> list[str]:
        before, after = (found.loc[label, tasks].mean() for found, label in zip(scores, (first, name), strict=True))
        moved[name] = after - before
        row = scores[0].loc[first]
        low, high = (f"{row[end]:.1f}" for end in ("average_low", "average_high"))
        return [f"`{name}`", f"{before:.1f}", f"{low} to {high}", f"{after:.1f}", f"{after - before:+.1f}"]

    lines = [line(first, name) for first, name in rows.items()]
    said = {"ties": "TIES", "pretrained": "the base"}
    steps = [abs(moved[name]) for name in plain if name not in ("smile", "pretrained")]
    outside = [
        f"{said.get(name, name)} ({moved[name]:+.1f})"
        for first, name in rows.items()
        if not scores[0].loc[first, "average_low"]
        <= scores[1].loc[name, "average"]
        <= scores[0].loc[first, "average_high"]
    ]
    twin = max(abs(moved[f"twin_merging (router={router})"]) for router in ("oracle", "text"))
    said = [
        f"{' and '.join(outside)} leave the interval of the first set",
        f"Twin-Merging moves by at most {twin:.1f}",
        f"with the paper's router it moves by {abs(moved['twin_merging (router=mlp)']):.1f}",
        f"static merges move by {min(steps):.1f} to {max(steps):.1f}",
    ]
    assert list(alive[0]) == list(alive[1]), "the interval is of the tasks of living experts"
    return markdown(["method", "first set", "its 95 % interval", "second set", "second - first"], lines), said


def bases() -> tuple[str, list[str]]:
    """The paper's router on three bases: which task is a row of?"""
    found = json.loads((ROOT / "results/studies/router_bases.json").read_text(encoding="utf-8"))["accuracy"]
    words = {"minilm": "MiniLM-L6, a sentence encoder", "mpnet": "MPNet-base, a sentence encoder"}
    words["smollm"] = "SmolLM2-135M, a language model"

    def mean(base: str, layer: str) -> float:
        return 100 * np.mean([*found[f"{base}, {layer}"].values()])

    def ends(base: str, layer: str) -> str:
        scores = {task: 100 * value for task, value in found[f"{base}, {layer}"].items()}
        worst = min(scores, key=scores.get)
        return f"{scores[worst]:.1f} {worst}"

    lines = [[said, *(f"{mean(b, n):.1f}" for n in ("3", "last")), ends(b, "last")] for b, said in words.items()]
    rows = {"sst2": 872, "mrpc": 408, "rte": 277}  # of the other tests the first 1,000
    variances = [sum(v * (1 - v) / rows.get(task, 1000) for task, v in tasks.items()) for tasks in found.values()]
    margin = 100 * 1.96 * max(variances) ** 0.5 / 8
    last = [f"{mean(base, 'last'):.1f} %" for base in ("smollm", "minilm")]
    said = [
        f"SmolLM2's last layer finds {last[0]} of the routes, MiniLM's {last[1]}",
        f"each mean open by up to {margin:.1f} points (95 %)",
    ]
    return markdown(["base", "third layer", "last layer", "worst task, last layer"], lines), said


@cache  # 10,000 samples of each run
def drawn(report: str, *labels: str) -> tuple[blocks.Block, bootstrap.Draws]:
    """The first block of a report of committed records, and the resampled scores of some of its rows."""
    results = REPORTS.parent
    block = blocks.blocks(read.chosen(store.latest(store.read(results)), results, None, report))[0]
    rows = [block.find(label) for label in dict.fromkeys(("individual", *labels))]  # probes have no expert to divide by
    block = replace(block, rows=[row for row in rows if row is not None])
    return block, bootstrap.draws(read.predictions(results, [block])[0], [block])[0]


def gap(report: str, row: str, other: str, sets: list[str]) -> str:
    """The points between two rows on tasks without an expert, averaged over their probes, with the paired interval."""
    block, draws = drawn(report, row, other)
    columns = [column for column in block.columns if column[0].rpartition("_")[0] in sets]
    sides, points = [], []
    for label in (row, other):
        runs = block.find(label).runs
        sides.append(100 * np.mean([bootstrap.over_seeds(runs, column, draws) for column in columns], axis=0))
        points.append(100 * np.mean([runs[0].scores[column] for column in columns]))
    low, high, _ = bootstrap.paired(*sides)
    return f"{points[0] - points[1]:+.1f} ({low:+.1f} to {high:+.1f})"


def whole() -> tuple[str, list[str]]:
    """The final rows on MPNet-base, on whole validation sets beside their first 1,000 rows."""
    first, report = "glue_mpnet", "glue_mpnet_whole"
    rows = {"individual": "individual"} | {TWIN.format(r): f"twin_merging (router={r})" for r in ("oracle", "text")}
    rows |= {name: name for name in ("ties", "task_arithmetic", "pretrained")}
    found = table(report, NAME)

    def line(before: str, label: str) -> list[str]:
        tasks = [f"{found.loc[label, task]:.1f}" for task in ("cola", "stsb", "mnli", "qnli")]
        return [f"`{label}`", kept(before, first, NAME), kept(label, report, NAME), *tasks]

    ladder = [found.loc[label] for label in rows.values()][1:]
    assert all(better.average_low > worse.average_high for better, worse in itertools.pairwise(ladder))
    heads = ["method", "first 1,000 rows", "whole sets", "CoLA", "STS-B", "MNLI", "QNLI"]
    return markdown(heads, [line(*row) for row in rows.items()]), []


def untouched(report: str, reference: str, rows: list[str], tasks: list[str]) -> list[str]:
    """Differences of rows to a reference, averaged over some tasks of a suite alone, each with its interval."""
    block, draws = drawn(report, reference, *rows)
    columns = [column for column in block.columns if column[0] in tasks]

    def sampled(label: str) -> tuple[float, np.ndarray]:
        runs = block.find(label).runs
        shares = [runs[0].scores[column] / block.individual[0].scores[column] for column in columns]
        return 100 * np.mean(shares), bootstrap.averages(runs, block.individual, columns, draws)

    centre, beside = sampled(reference)
    gaps = [(score - centre, *bootstrap.paired(samples, beside)) for score, samples in map(sampled, rows)]
    return [f"{gap:+.1f} ({low:+.1f} to {high:+.1f})" for gap, low, high, _ in gaps]


def official() -> tuple[str, list[str]]:
    """Routers on test rows that nobody had looked at."""
    report = "glue_mpnet_official"
    found = table(report, NAME)

    def line(words: str, label: str) -> list[str]:
        row = found.loc[label]
        gap = f"{row.difference:+.1f} ({row.difference_low:+.1f} to {row.difference_high:+.1f})"
        return [words, f"{row.stsb:.1f}", f"{row.mrpc:.1f}", kept(label, report, NAME), "" if row.reference else gap]

    rows = {f"Twin-Merging, `{name}`": f"twin_merging (router={name})" for name in ("oracle", "risk", "text", "mlp")}
    rows |= {"Task Arithmetic": "task_arithmetic", "the unmerged base": "pretrained"}
    heads = ["method and router", "STS-B", "MRPC", "average of all eight tasks", "difference to `text`"]
    text, *others = (f"twin_merging (router={name})" for name in ("text", "risk", "mlp"))
    risk, mlp = untouched(report, text, others, ["stsb", "mrpc"])
    said = f"the router that goes by risk differs from it by {risk}, and the paper's by {mlp}"
    return markdown(heads, [line(*row) for row in rows.items()]), [said]


ABLATIONS = whole, second, compression, shared, shared_by_rank, combined, combined_on_test, protocols, router
ABLATIONS += bases, tasks, unseen, official
