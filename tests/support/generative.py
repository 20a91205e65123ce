"""The tables and figures of results/README.md on the four generative tasks, as their committed reports give them."""

import pandas as pd

from support.ablations import drawn
from support.reports import kept, markdown, table
from twinbench.report import bootstrap

EXPERTS, MERGED, NAME = "generative_smollm", "generative_living", "strict_normalized"
TASKS = {"mmlu": "MMLU", "truthful_qa": "TruthfulQA", "bbq": "BBQ", "cnn_dailymail": "CNN/DailyMail"}
METRICS = {"acc": "accuracy", "rouge2": "ROUGE-2"}


def over(row: pd.Series, name: str) -> str:
    """A difference in points with its interval."""
    return f"{row[name]:+.1f} ({row[f'{name}_low']:+.1f} to {row[f'{name}_high']:+.1f})"


def generative_experts() -> tuple[str, list[str]]:
    """Each expert beside the best constant answer and the unmerged base."""
    found = table(EXPERTS, "strict_living")
    assert found["expert is"].to_dict() == dict(zip(TASKS, ("dead", "alive", "alive", "dead"), strict=True))

    def line(task: str, said: str) -> list[str]:
        row = found.loc[task]
        scores = (f"{row[name]:.1f}" for name in ("score", "best constant", "base"))
        leads = (over(row, f"over {name}") for name in ("best constant", "base"))
        return [f"{said}, {METRICS[row.metric]}", *scores, *leads, row["expert is"]]

    heads = ["task", "expert", "best constant answer", "base", "over that answer", "over the base", "expert is"]
    return markdown(heads, [line(*task) for task in TASKS.items()]), []


def twin(rank: str, shared: str, router: str = "oracle") -> str:
    """The name of a row of Twin-Merging."""
    return f"twin_merging (rank_ratio={rank}, method@shared={shared}, router={router})"


WITH, WITHOUT = twin("0.1", "task_arithmetic"), twin("0.0278", "pretrained")
RANKS = "0.1", "0.0278", "0.007"
ROUTERS = {
    "the known task": WITH,
    "whole prompts": twin("0.1", "task_arithmetic", "mlp, router.pool=mean"),
    "what a prompt is about": twin("0.1", "task_arithmetic", "mlp, router.pool=content"),
    "whole prompts; no shared expert": twin("0.1", "pretrained", "mlp, router.pool=mean"),
}


def merged() -> pd.DataFrame:
    """The rows of all four merged, with what they take in MB, and of that what is beside one model."""
    rows = table(MERGED, NAME).join(table(MERGED, "strict_storage")["total"] / 1e6)
    return rows.assign(beside=rows["total"] - rows.loc["pretrained", "total"])


def generative_merges() -> tuple[str, list[str]]:
    """All four merged; the tasks of the living experts."""
    rows = merged()
    kinds, asked = (WITHOUT, *list(ROUTERS.values())[:3]), ROUTERS["whole prompts"]
    shown = [label for label in rows.index if not label.startswith("twin") or label in kinds]

    def line(label: str) -> list[str]:
        row = rows.loc[label]
        gap = "" if row.reference or pd.isna(row.difference) else over(row, "difference")
        cells = [f"{row.truthful_qa:.1f}", f"{row.bbq:.1f}", kept(label, MERGED, NAME), f"{row.corrected:.1f}"]
        return [f"`{label}`", *cells, gap, f"{row.total:.0f}"]

    def lead(method: str, task: str) -> str:
        """The points of a merge over the unmerged base."""
        block, draws = drawn(MERGED, method, "pretrained")
        (column,) = [column for column in block.columns if column[0] == task]
        runs = [block.find(label).runs for label in (method, "pretrained")]
        low, high, _ = bootstrap.paired(*(100 * bootstrap.over_seeds(of, column, draws) for of in runs))
        one, other = (100 * of[0].scores[column] for of in runs)
        return f"{one - other:+.1f} points ({low:+.1f} to {high:+.1f})"

    said = [
        f"Task Arithmetic's lead over the base is {lead('task_arithmetic', 'truthful_qa')} on TruthfulQA and "
        f"{lead('task_arithmetic', 'bbq')} on BBQ",
        f"take {rows.total.individual:.0f} MB; Twin-Merging keeps {rows.average[asked]:.1f} "
        f"({rows.total[asked]:.0f} MB), TIES {rows.average.ties:.1f} ({rows.total.ties:.0f} MB)",  # in README.md
    ]
    heads = ["method", "TruthfulQA", "BBQ", "average", "chance-corrected", "difference to the reference", "MB"]
    return markdown(heads, [line(label) for label in shown]), said


def generative_ranks() -> tuple[str, list[str]]:
    """Told the task: score by rank, with a shared expert and without; MB of the exclusive parts."""
    rows, gain = merged(), table(MERGED, "strict_shared")

    def line(rank: str) -> list[str]:
        first, second = twin(rank, "task_arithmetic"), twin(rank, "pretrained")
        cells = [cell for label in (first, second) for cell in (kept(label, MERGED, NAME), f"{rows.beside[label]:.0f}")]
        return [rank, *cells, over(gain.loc[first], "average")]

    heads = ["rank ratio", "shared expert", "MB of parts", "none", "MB of parts", "what it adds"]
    least = twin(RANKS[-1], "pretrained")
    assert (gain["average_low"] <= 0).all() and 4 * rows.beside[least] < rows.beside["individual"]
    said = [
        f"they take {rows.beside[WITH]:.0f} MB, the adapters {rows.beside['individual']:.0f} MB",
        f"they take {rows.beside[least]:.0f} MB and keep {kept(least, MERGED, NAME)}",
    ]
    return markdown(heads, [line(rank) for rank in RANKS]), said


def generative_routers() -> tuple[str, list[str]]:
    """What a router reads of a prompt."""
    rows, right = table(MERGED, NAME), table(MERGED, "strict_router")

    def line(words: str, label: str) -> list[str]:
        row = rows.loc[label]
        hits = (
            [f"{right.loc[label, task]:.1f}" for task in ("truthful_qa", "bbq")] if label in right.index else 2 * [""]
        )
        return [words, f"{row.truthful_qa:.1f}", f"{row.bbq:.1f}", kept(label, MERGED, NAME), *hits]

    def lost(task: str) -> str:
        """Of a task by the router that reads contents: wrong routes, and what they cost."""
        label = ROUTERS["what a prompt is about"]
        cost = rows.loc[WITH, task] - rows.loc[label, task]
        return f"{cost:.1f} points with {100 - right.loc[label, task]:.1f} % of wrong routes"

    said = [f"BBQ loses {lost('bbq')}", f"TruthfulQA {lost('truthful_qa')}"]
    heads = ["the router reads", "TruthfulQA", "BBQ", "average", "right routes: TruthfulQA, %", "BBQ, %"]
    return markdown(heads, [line(*row) for row in ROUTERS.items()]), said


GENERATIVE = generative_experts, generative_merges, generative_ranks, generative_routers
