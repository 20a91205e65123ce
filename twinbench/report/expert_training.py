"""What a report says of the experts themselves: the rows they learn from, how they were trained, and how it went.

``RESULTS/experts/SUITE_ID.json`` holds the training of a suite's experts, by task; without it there is nothing to show
but where the rows come from, which the records say themselves.
"""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from twinbench.records.record import is_local
from twinbench.report import plots
from twinbench.report.blocks import Block

STYLES = ("#0072b2", "o"), ("#d55e00", "s")  # colour and marker of training rows and of held-out rows
ACROSS = 4  # tasks beside each other
WIDTH, HEIGHT = 1.85, 0.95  # of a panel, in inches
LEFT, NAME, UNIT, EPOCHS = 0.5, 0.2, 0.24, 0.4  # room for a scale, a task's name, a unit and the epochs, in inches


def origins(blocks: Sequence[Block], training: Mapping[str, Mapping]) -> pd.DataFrame:
    """Where each task's rows come from, and how many each split has; no line where no origin is known.

    Args:
        blocks: of one suite_id.
        training: by task, as ``records.experts`` gives it; empty where there is none.

    Returns:
        Columns task, one per split (rows; NaN where not known), origin.
    """
    found = {name: {"task": name} | expert["rows"] | {"origin": expert["data"]} for name, expert in training.items()}
    runs = [run for block in blocks for row in [*block.rows, *block.experts] for run in row.runs]
    for record in (record for run in runs for record in run.records):
        line = found.setdefault(record["task"], {"task": record["task"]})
        line[record["split"]] = record["n"]
        line["origin"] = line.get("origin") or record["data"]
    if not any(line["origin"] for line in found.values()):
        return pd.DataFrame()
    there = {split for line in found.values() for split in line} - {"task", "origin"}
    first = [split for split in ("train", "validation", "test") if split in there]
    return pd.DataFrame(found.values(), columns=["task", *first, *sorted(there - set(first)), "origin"])


def origin_notes(table: pd.DataFrame) -> list[str]:
    """A sentence on the tasks whose rows were read from a local folder."""
    local = [task for task, origin in zip(table["task"], table["origin"], strict=True) if is_local(origin)]
    if not local:
        return []
    return [
        f"Read from a local copy: {', '.join(local)}. A local copy may differ from the official split of that name, in "
        "its rows and in their number; its sha256 says which copy it was."
    ]


def tables(training: Mapping[str, Mapping]) -> dict[str, pd.DataFrame]:
    """The tables of the section on the experts, one unit each: training, learned, seconds; and learning, every number.

    Args:
        training: by task, as ``records.experts`` gives it.
    """
    learning = pd.concat([curve(name, expert) for name, expert in training.items()], ignore_index=True)
    learned = learning.assign(epoch=learning["epoch"].astype(str), value=100 * learning["value"])
    learned = learned.pivot(index="task", columns="epoch", values="value").loc[list(training)]
    learned = learned[sorted(learned, key=int)].rename(columns="epoch {}".format)
    last = [100 * learning.loc[learning["task"] == name, "value"].iloc[-1] for name in training]
    learned = learned.reset_index().rename_axis(columns=None)
    learned.insert(1, "metric", [expert["metric"] for expert in training.values()])
    learned["last"] = last
    seconds = {"task": list(training), "device": [], "training": []}
    for expert in training.values():
        seconds["device"].append(expert["device"])
        seconds["training"].append(expert["seconds"])
    return {
        "training": pd.DataFrame([_settings(name, expert) for name, expert in training.items()]),
        "learned": learned,
        "seconds": pd.DataFrame(seconds),
        "learning": learning,
    }


def _settings(name: str, expert: Mapping) -> dict:
    recipe = expert["recipe"]
    return {
        "task": name,
        "rows": expert["rows"]["train"],
        "epochs": recipe["epochs"],
        "learning rate": recipe["lr"],
        "batch size": recipe["batch_size"],
        "weight decay": recipe["weight_decay"],
        "warm-up": recipe["warmup"],
        "seed": recipe["seed"],
        "frozen": _frozen(recipe),
        "computed in": "bfloat16" if recipe.get("bf16") else "float32",
    }


def _frozen(recipe: Mapping) -> str:
    if "rank" in recipe:
        return f"all but LoRA of rank {recipe['rank']}, alpha {recipe['alpha']} on {', '.join(recipe['targets'])}"
    return ", ".join(recipe["freeze"]) or "nothing"


def curve(name: str, expert: Mapping) -> pd.DataFrame:
    """The learning curve of an expert, one line per epoch.

    Returns:
        Columns task, epoch, training_loss (mean over the epoch), held_out_loss and value (of the primary metric on the
        held-out rows, both after the epoch), loss and metric (what these two are).
    """
    score = f"eval_{expert['metric']}"
    epochs: dict[int, dict] = {}
    for entry in expert["curve"]:
        if entry.keys() & {"loss", score}:  # not the summary that ends a log
            epochs.setdefault(round(entry["epoch"]), {}).update(entry)
    lines = [(name, epoch, log.get("loss"), log.get("eval_loss"), log.get(score)) for epoch, log in epochs.items()]
    frame = pd.DataFrame(lines, columns=["task", "epoch", "training_loss", "held_out_loss", "value"])
    numbers = ["training_loss", "held_out_loss", "value"]
    return frame.astype(dict.fromkeys(numbers, float)).assign(loss=expert["loss"], metric=expert["metric"])


@mpl.rc_context(plots.STYLE)
def draw(learning: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Small multiples: per task the losses over epochs, and under them the held-out score.

    All panels share one set of axes, measured in inches: axes of their own would take half a second to draw.

    Args:
        learning: as ``tables`` gives it.
    """
    tasks = [(name, group) for name, group in learning.groupby("task", sort=False)]
    across, down = min(ACROSS, len(tasks)), -(-len(tasks) // ACROSS)
    pair = NAME + 2 * (UNIT + HEIGHT) + EPOCHS
    figure = plots.titled(0.15 + across * (LEFT + WIDTH), 0.6 + down * pair, title, subtitle)
    sheet = figure.add_axes([0, 0, 1, 1])
    sheet.set(xlim=(0, figure.get_figwidth()), ylim=(0, figure.get_figheight()))
    sheet.set_axis_off()
    for number, (name, group) in enumerate(tasks):
        left, top = LEFT + number % ACROSS * (LEFT + WIDTH), (down - number // ACROSS) * pair - NAME
        sheet.text(left, top, name, weight="bold", va="bottom")
        losses, score = group[["training_loss", "held_out_loss"]], 100 * group["value"]
        upper, lower = top - UNIT - HEIGHT, top - 2 * (UNIT + HEIGHT)
        epochs = left + WIDTH * (group["epoch"] - 0.7) / (group["epoch"].max() - 0.4)
        unit = f"loss: {group['loss'].iloc[0]}"
        _panel(sheet, left, upper, epochs, unit, 0.0, (losses["training_loss"], losses["held_out_loss"]))
        _panel(sheet, left, lower, epochs, f"{group['metric'].iloc[0]} (points)", None, (None, score))
        shown = slice(None, None, -(-len(group) // 8))
        for x, epoch in zip(epochs[shown], group["epoch"][shown], strict=True):
            sheet.text(x, lower - 0.05, epoch, ha="center", va="top")
        sheet.text(left + WIDTH / 2, lower - 0.2, "epoch", ha="center", va="top")
    keys = [Line2D([], [], color=colour, marker=marker, markersize=4) for colour, marker in STYLES]
    figure.legend(keys, ["training rows", "held-out rows"], loc="upper right", ncols=2, frameon=False, borderpad=0.2)
    return figure


def _panel(
    sheet,
    left: float,
    bottom: float,
    x: pd.Series,
    unit: str,
    least: float | None,
    lines: tuple[pd.Series | None, pd.Series],
) -> None:
    """One panel, its lower left corner at (left, bottom): what is shown, a scale, and a line per kind of rows.

    Args:
        x: of the points, in inches.
        least: where the scale begins; None is a little below the lowest value.
        lines: of training rows and of held-out rows.
    """
    sheet.text(left, bottom + HEIGHT + 0.03, unit, size=7.5, color=plots.MUTED, va="bottom")
    values = np.concatenate([line for line in lines if line is not None])
    values = values[np.isfinite(values)]
    if not len(values):
        return  # a training that diverged at once
    pad = 0.12 * np.ptp(values) or 0.05 * abs(values[0]) or 1.0
    low, high = values.min() - pad if least is None else least, values.max() + pad
    ticks = MaxNLocator(3).tick_values(low, high)
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    places = bottom + HEIGHT * (ticks - low) / (high - low)
    sheet.hlines(places, left, left + WIDTH, color=plots.LINE, lw=0.6)
    for y, tick in zip(places, ticks, strict=True):
        sheet.text(left - 0.06, y, f"{tick:g}", ha="right", va="center_baseline")
    for line, (colour, marker) in zip(lines, STYLES, strict=True):
        if line is not None:
            y = bottom + HEIGHT * (line - low) / (high - low)
            sheet.plot(x, y, color=colour, marker=marker, markersize=4, lw=1.3)
