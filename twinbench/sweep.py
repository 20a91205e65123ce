"""What happens when the jobs of a sweep have ended: the report, its W&B run, and the exit code."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from twinbench import processes


def finish(config: DictConfig, jobs: list[dict[str, str]]) -> int:
    """Report on a sweep whose jobs have ended.

    Args:
        jobs: per job its ``suite``, ``status`` (ok, skipped, failed; planned, done under ``plan=true``), and its
            ``run_id``, which a job that could not be planned lacks.

    Returns:
        The exit code: 1 if a job failed.
    """
    statuses = [job["status"] for job in jobs]
    print(", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)), flush=True)
    if config.plan or processes.rank():  # a launcher ends the first process when another one fails
        return 0
    from twinbench import records, report, tracking  # seconds of imports that planning need not pay

    folder, group = Path(config.results_dir), Path(config.hydra.sweep.dir).name
    suites, experiment = list(dict.fromkeys(job["suite"] for job in jobs)), config.hydra.runtime.choices["experiment"]
    reports = [{"suite": suite} for suite in suites]
    if experiment and experiment not in suites:  # one that has a suite's name is about the whole suite
        records.write_sweep(folder, experiment, sorted({job["run_id"] for job in jobs if "run_id" in job}))
        reports = [{"experiment": experiment}]
    for which in reports:
        try:
            made = report.make(folder, **which)
        except (ValueError, OSError) as error:  # such as: every job failed before it had a record
            print(f"error: no report of {' '.join(*which.items())}: {error}", file=sys.stderr, flush=True)
            return 1
        print(f"report: {made['folder'] / 'index.html'}", flush=True)
        tracking.log_report(made, mode=config.wandb.mode, folder=folder, project=config.wandb.project, group=group)
    return int("failed" in statuses)
