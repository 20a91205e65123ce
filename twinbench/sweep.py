"""What happens when the jobs of a sweep have ended: the report, its W&B run, and the exit code."""

import sys
from pathlib import Path

from omegaconf import DictConfig


def finish(config: DictConfig, jobs: list[dict[str, str]]) -> int:
    """Report on a sweep whose jobs have ended.

    Args:
        jobs: per job its ``suite`` and ``status`` (ok, skipped, failed; planned, done under ``plan=true``).

    Returns:
        The exit code: 1 if a job failed.
    """
    statuses = [job["status"] for job in jobs]
    print(", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)), flush=True)
    if config.plan:
        return 0
    from twinbench import report, tracking  # seconds of imports that planning need not pay

    for suite in dict.fromkeys(job["suite"] for job in jobs):
        try:
            made = report.make(Path(config.results_dir), suite)
        except (ValueError, OSError) as error:  # such as: every job failed before it had a record
            print(f"error: no report of suite {suite}: {error}", file=sys.stderr, flush=True)
            return 1
        print(f"report: {made['folder'] / 'index.html'}", flush=True)
        group = Path(config.hydra.sweep.dir).name
        folder = Path(config.results_dir)
        tracking.log_report(made, mode=config.wandb.mode, folder=folder, project=config.wandb.project, group=group)
    return int("failed" in statuses)
