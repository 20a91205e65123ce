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


def generative_merges() -> tuple[str, list[str]]:
    """All four merged; the tasks of the living experts."""
    rows = table(MERGED, NAME).join(table(MERGED, "strict_storage")["total"])

    def line(label: str) -> list[str]:
        row = rows.loc[label]
        gap = "" if row.reference or pd.isna(row.difference) else over(row, "difference")
        cells = [f"{row.truthful_qa:.1f}", f"{row.bbq:.1f}", kept(label, MERGED, NAME), f"{row.corrected:.1f}"]
        return [f"`{label}`", *cells, gap, f"{row.total / 1e6:.0f}"]

    def lead(task: str) -> str:
        """The points of Task Arithmetic over the unmerged base."""
        block, draws = drawn(MERGED)
        (column,) = [column for column in block.columns if column[0] == task]
        runs = [block.find(label).runs for label in ("task_arithmetic", "pretrained")]
        low, high, _ = bootstrap.paired(*(100 * bootstrap.over_seeds(of, column, draws) for of in runs))
        one, other = (100 * of[0].scores[column] for of in runs)
        return f"{one - other:+.1f} points ({low:+.1f} to {high:+.1f})"

    (twin,) = (label for label in rows.index if label.startswith("twin_merging") and "=pretrained" not in label)
    (bare,) = (label for label in rows.index if "=pretrained" in label)
    assert rows.loc[twin, "reference"]
    sizes = rows["total"] - rows.loc["pretrained", "total"]
    said = [
        f"Task Arithmetic's lead over the base is {lead('truthful_qa')} on TruthfulQA and {lead('bbq')} on BBQ",
        f"they take {sizes[twin] / 1e6:.0f} MB, the adapters {sizes['individual'] / 1e6:.0f} MB",
        f"they take {sizes[bare] / 1e6:.0f} MB and keep {kept(bare, MERGED, NAME)}",
    ]
    heads = ["method", "TruthfulQA", "BBQ", "average", "chance-corrected", "difference to the reference", "MB"]
    return markdown(heads, [line(label) for label in rows.index]), said


GENERATIVE = generative_experts, generative_merges
