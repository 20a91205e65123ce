"""Weights & Biases: a mirror of the records, never their home.

One W&B run per configuration and one report run per sweep. Deleting every W&B file loses nothing, and W&B failing never
fails a run: what goes wrong here is one warning line. wandb is imported on first use, because it costs half a second.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from twinbench.records.record import ROUTED_TO, Record

logger = logging.getLogger(__name__)

PER_TASK = ("eval_seconds", "route_seconds")
# The run's seconds and bytes.
MEASUREMENTS = [n for n in Record.__annotations__ if n.endswith(("_seconds", "_bytes")) and n not in PER_TASK]

SETTINGS = {
    "reinit": "create_new",  # a run left open elsewhere in the process must not receive these scores
    "init_timeout": 30.0,  # seconds; online without a network, the default of 90 is paid by every run
    "finish_timeout": 120.0,  # seconds; what is not uploaded by then stays on disk for `wandb sync`
    "symlink": False,  # concurrent runs would race for `latest-run`
    # The records already hold commit, versions and device, so W&B need not collect them again.
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


def log_run(rows: list[dict], config: dict, *, mode: str, folder: Path, project: str, group: str | None) -> None:
    """Log one configuration: its scores as scalars, as a table and as figures.

    Keys: "TASK/METRIC" per row, "average" (mean of the raw primary metrics), `MEASUREMENTS`, "eval_seconds" (sum over
    tasks), "tables/scores", "figures/scores" and, for a routed run, "figures/router". A failed run has its status and
    error in the config and ends as failed.

    Args:
        rows: All records of one run; at least one.
        config: The resolved configuration, plain containers only.
        mode: "offline", "online" or "disabled".
        folder: Where wandb makes its own folder `wandb`.
        group: The sweep or experiment that the run belongs to.
    """
    if mode == "disabled":
        return
    with _never_failing("run"):
        first = rows[0]
        failed = first["status"] != "ok"
        seed = "" if first["seed"] is None else f" seed {first['seed']}"
        _send(
            {} if failed else _run_content(rows),
            config | ({"status": first["status"], "error": first["error"]} if failed else {}),
            exit_code=int(failed),
            folder=folder,
            id=first["run_id"],
            name=f"{first['method']} {first['protocol']}{seed}",
            job_type="run",
            mode=mode,
            project=project,
            group=group,
        )


def log_report(report: dict, *, mode: str, folder: Path, project: str, group: str | None) -> None:
    """Log one sweep's report as "tables/NAME" and "figures/NAME".

    Args:
        report: {"tables": {name: DataFrame}, "figures": {name: Path of a PNG}}. A table's column names are flat and its
            index is not logged.
        mode: "offline", "online" or "disabled".
        folder: Where wandb makes its own folder `wandb`.
        group: The sweep or experiment that is reported.
    """
    if mode == "disabled":
        return
    with _never_failing("report"):
        tables = {f"tables/{name}": table for name, table in report["tables"].items()}
        figures = {f"figures/{name}": path for name, path in report["figures"].items()}
        _send(
            tables | figures,
            {},
            exit_code=0,
            folder=folder,
            name="report" if group is None else f"report {group}",
            job_type="report",
            mode=mode,
            project=project,
            group=group,
        )


@contextmanager
def _never_failing(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever W&B raises, the records are safe on disk and the sweep goes on
        logger.warning("W&B %s not logged: %s: %s", what, type(error).__name__, " ".join(str(error).split()))


def _send(content: dict[str, Any], config: dict, *, exit_code: int, folder: Path, **identity: Any) -> None:
    """Write one W&B run: DataFrames become tables, figures and paths become images."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # wandb would write to the system's temporary folder instead
        raise PermissionError(f"W&B folder {folder} is not writable")
    # Only the environment reaches these: crash reports go out even offline, staged tables and logs to the home folder.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb"))
    import wandb

    payload = {key: _to_wandb(value) for key, value in content.items()}
    run = wandb.init(dir=folder, config=config, settings=wandb.Settings(**SETTINGS), **identity)
    try:
        run.log(payload)
    finally:
        run.finish(exit_code)


def _to_wandb(value: Any) -> Any:
    import PIL.Image
    import wandb

    if isinstance(value, pd.DataFrame):
        cells = value.astype(object).where(value.notna(), None)  # NaN would be written as such, which is no JSON
        return wandb.Table(columns=list(value.columns), data=cells.to_numpy().tolist(), allow_mixed_types=True)
    if isinstance(value, Path):
        return wandb.Image(value)
    if isinstance(value, Figure):
        # Pixels, not the figure: given a Figure, wandb.Image looks for pyplot, which nothing here imports.
        canvas = FigureCanvasAgg(value)
        canvas.draw()
        return wandb.Image(PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())))
    return value


def _run_content(rows: list[dict]) -> dict[str, Any]:
    primary = [row for row in rows if row["primary"]]
    routed = [row for row in rows if row["metric"].startswith(ROUTED_TO)]
    asked = {row["split"] for row in primary}  # other splits are scored beside it
    beside = {id(row): "" if row["split"] in asked else f" on {row['split']}" for row in rows}
    content = {f"{row['task']}/{row['metric']}{beside[id(row)]}": row["value"] for row in rows}
    content |= {key: rows[0][key] for key in MEASUREMENTS}
    for key in PER_TASK:
        seconds = {(row["task"], row["split"]): row[key] for row in rows if row[key] is not None}
        content[key] = sum(seconds.values())
    content["average"] = fmean(row["value"] for row in primary)
    content["tables/scores"] = pd.DataFrame(rows, columns=["task", "split", "metric", "value", "n"])
    content["figures/scores"] = _draw_scores(primary)
    if routed:
        content["figures/router"] = _draw_router(routed)
    return content


def _draw_scores(rows: list[dict]) -> Figure:
    """Bars of the primary metric per task."""
    axes = _axes([f"{row['task']} ({row['metric']})" for row in rows], width=4)
    axes.bar_label(axes.barh(range(len(rows)), [row["value"] for row in rows]), fmt="%.3f", fontsize=8, padding=2)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_xlabel("score (raw)")
    axes.spines[["top", "right"]].set_visible(False)
    return axes.figure


def _draw_router(rows: list[dict]) -> Figure:
    """Heat map: the fraction of each task's rows (down) that goes to each expert (across); under 0.005 left blank."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    experts = list(dict.fromkeys(row["metric"].removeprefix(ROUTED_TO) for row in rows))
    shares = np.zeros((len(tasks), len(experts)))
    for row in rows:
        shares[tasks.index(row["task"]), experts.index(row["metric"].removeprefix(ROUTED_TO))] = row["value"]
    axes = _axes(tasks, width=len(experts) * max(0.6, 0.09 * max(map(len, experts))))
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(experts)), experts, fontsize=8)
    axes.set_xlabel("expert with the largest weight")
    for row, column in np.argwhere(shares >= 0.005):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{shares[row, column]:.2f}", ha="center", va="center", fontsize=8, color=color)
    return axes.figure


def _axes(labels: list[str], *, width: float) -> Axes:
    """Axes `width` inches wide with one labelled row per label; fixed margins, as a layout engine doubles the time."""
    left, right, bottom, top = 0.3 + 0.08 * max(map(len, labels)), 0.3, 0.6, 0.15
    height = 0.4 * len(labels)
    total = (left + width + right, bottom + height + top)
    axes = Figure(figsize=total).add_axes((left / total[0], bottom / total[1], width / total[0], height / total[1]))
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    return axes
