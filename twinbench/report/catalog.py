"""Every table of a report, once: what it is called, what it says, how its numbers are shown, and where it stands."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from twinbench.report.cells import differences, living, losses, normalized, rounded, spans

LEADERBOARD, EXPERTS = "leaderboard.md", "experts.md"
ONE = "{:.1f}".format


@dataclass(frozen=True)
class Table:
    """A table as readers see it; its numbers at full precision come from `tables` or `expert_training`.

    Attributes:
        cells: turns the numbers into text.
        files: the Markdown files that show it; the page shows every table.
        latex: the LaTeX file that shows it, and its caption there.
    """

    name: str
    title: str
    caption: str
    cells: Callable[[pd.DataFrame], pd.DataFrame]
    files: tuple[str, ...] = (LEADERBOARD,)
    latex: tuple[str, str] | None = None


# In the order in which they stand. What a report computes beside them has a CSV file only.
TABLES = (
    Table(
        "tasks",
        "Average normalized score by the number of tasks (%)",
        "Over the tasks of living experts. Of several subsets with as many tasks: the mean, and from the lowest to "
        "the highest. Empty: the method lacks a subset. Rows at one number alone are left out. Each subset's own table "
        "stands below.",
        spans,
    ),
    Table(
        "normalized",
        "Normalized score (%)",
        "In % of the individual expert's score, best average first. ± is the standard deviation over seeds. Average, "
        "worst task and chance-corrected average, (score - best constant answer) / (expert - best constant answer), "
        "are over the tasks of living experts. Intervals and p: paired bootstrap over the scored examples and the "
        "seeds, 10,000 resamples; they do not cover other experts. p is Holm's for the table. Rows of one tier: none "
        "is significantly below the tier's first.",
        normalized,
        latex=("leaderboard.tex", "score in % of the individual expert's"),
    ),
    Table(
        "settings",
        "The best setting of each method on held-out rows (%)",
        "Normalized average of a method's best and of its worst setting. The distance is what choosing is worth. These "
        "numbers have chosen settings, so they are too good for the best ones; the test says what a method is worth. "
        "Minutes: to merge, train routers, route and score all settings that have a score, on a busy machine too.",
        rounded(ONE),
    ),
    Table(
        "living",
        "Is each expert alive? (points)",
        "Each expert against the best constant answer to its task and against the unmerged base, on the scored rows. "
        "An expert is alive if the 95 % intervals of both leads are above 0; a dead one's task counts in no average. "
        "Not tested: its predictions or the best constant answer are unknown; it counts.",
        living,
    ),
    Table(
        "raw",
        "Raw score (points)",
        "×100, in the metric named in the column. The average is over the tasks of living experts.",
        rounded(ONE),
    ),
    Table(
        "shared",
        "With a shared expert minus without (percentage points)",
        "Normalized score of the row minus that of the row without a shared expert (method@shared=pretrained) "
        "that is equal to it otherwise: the same router settings and bytes of exclusive parts. * marks a paired "
        "95 % bootstrap interval over the scored examples without 0; the CSV has all intervals.",
        differences,
    ),
    Table(
        "losses",
        "Where a routed method loses (percentage points)",
        "Lost to the route: the same method told the task, minus the row. Lost to the parts: the experts, minus the "
        "method told the task. Without parts: the average of the model that the parts are added to. Intervals: paired "
        "bootstrap over the scored examples and the seeds; they are not corrected for the rows of the table.",
        losses,
    ),
    Table(
        "unseen",
        "Above the unmerged base, on tasks without an expert (points)",
        "Score of the row minus that of the base, ×100, each scored by its own linear probe or by another task's head. "
        "* marks a paired 95 % bootstrap interval over the scored examples without 0. p is Holm's for the table.",
        differences,
    ),
    Table(
        "storage",
        "Storage (MB), data needs and settings tried",
        "Bytes written / 10⁶. Exclusive parts stored dense take as much as an expert each, also where the "
        "method's authors would store masks or factors; empty: the record is older than this column. Data needs: "
        "what the method and its router read beside the experts' weights, apart from choosing hyperparameters. "
        "Settings tried: of the method, on held-out rows of these experts, as far as there are records. Place: of the "
        "row's parameters by their average there, in the largest search that has them; 1 of 8 is the best of eight. A "
        "router that was not searched has the place of its method's parameters. Empty: no search has them.",
        rounded(lambda value: f"{value / 1e6:.2f}"),
    ),
    Table(
        "time",
        "Time (s)",
        "Merging and router training (reading its training rows included): once; empty where a record is older "
        "than the measurement, or an earlier run had kept what the router reads. Routing and evaluation: the sum over "
        "all tasks and splits scored. Per 1000 rows: "
        "routing and evaluation together, over the rows of those splits. Runs are left out while which other processes "
        "used more than 5 % of the machine's cores, or where the record does not say.",
        rounded("{:.2f}".format),
    ),
    Table(
        "router",
        "Router accuracy (%)",
        "Share of a task's scored rows whose largest router weight is on the task's own expert.",
        rounded(ONE),
    ),
    Table(
        "experts",
        "Each expert on each task (points)",
        "×100. Row: the one expert used. Column: the task. The diagonal is each expert on its own task.",
        rounded(ONE),
        (EXPERTS,),
    ),
    Table(
        "published",
        "Published scores (normalized, %)",
        "As others published them, with their checkpoints and evaluation sets. Ours: the average of our row of "
        "that name. Difference: ours - theirs, only where base and experts are the same.",
        rounded(ONE),
    ),
    Table(
        "failed",
        "Failed runs",
        "These ended in an error and have no result.",
        rounded(str),
    ),
    Table(
        "training",
        "How the experts were trained",
        "AdamW from the base model, linear warm-up (a fraction of the steps), linear decay to 0. Rows: those "
        "trained on. Frozen: parameters that stay the base's, by how their names begin.",
        rounded(lambda value: f"{value:.0f}" if value == int(value) else f"{value:g}"),
        (LEADERBOARD, EXPERTS),
        latex=("experts.tex", "how each was trained"),
    ),
    Table(
        "learned",
        "Held-out score after each epoch (points)",
        "×100, in the task's primary metric, on the held-out rows. The expert is what the last epoch leaves; no "
        "epoch is chosen.",
        rounded(ONE),
        (LEADERBOARD, EXPERTS),
    ),
    Table(
        "seconds",
        "Training time (s)",
        "Of one expert from the loaded base to the saved model, scoring after each epoch included.",
        rounded("{:.0f}".format),
        (LEADERBOARD, EXPERTS),
    ),
    Table(
        "origins",
        "Rows and where they come from",
        "Rows per split. Experts are trained on train; validation is held out of the training data, for the "
        "learning curves, the router and choices; scores are on test, and on what else is named.",
        rounded("{:.0f}".format),
    ),
)
