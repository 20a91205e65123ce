"""What happens before the jobs of a sweep begin, and when they have ended: checks; report, W&B run and exit code."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from twinbench.plan import preflight
from twinbench.records import store
from twinbench.system import processes
from twinbench.system.ending import interrupt_first
from twinbench.system.files import check_writable
from twinbench.system.mistakes import Mistake

ONE = ("results_dir", "plan", "wandb", "wandb.mode", "wandb.project")  # keys that a sweep has one value of


def check(config: DictConfig, swept: Sequence[str]) -> None:
    """Find what is wrong with a sweep as a whole, before it makes a folder; each job is checked in its turn.

    Args:
        swept: the keys with several values on the command line.

    Raises:
        ValueError: one line with the key, the value and what is legal.
    """
    for key in ONE:
        if key in swept:
            raise Mistake(f"{key} has several values, and a sweep has one; sweep over what is measured")
    whole = OmegaConf.to_container(OmegaConf.masked_copy(config, preflight.SETTINGS), resolve=True)
    preflight.settings(whole)


def make_folder(config: DictConfig) -> None:
    """Make the sweep's own folder, or raise OSError where records could not be written either."""
    check_writable(Path(config.results_dir).expanduser())
    Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)


@contextmanager
def counted(config: DictConfig) -> Iterator[None]:
    """Let an interrupt between two jobs say how many are done, as one inside a job does: each job has a folder."""
    try:
        with interrupt_first():
            yield
    except KeyboardInterrupt as stop:
        begun = [folder for folder in Path(config.hydra.sweep.dir).iterdir() if folder.name.isdigit()]
        raise stop if str(stop) or config.plan else type(stop)(f"{len(begun)} done, the same command goes on") from None


def finish(config: DictConfig, jobs: list) -> int:
    """Report on a sweep whose jobs have ended.

    Args:
        jobs: per job its `twinbench.command.Outcome`.

    Returns:
        The exit code: 1 if a job failed.
    """
    statuses = [job.status for job in jobs]
    print(", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)), flush=True)
    failed = int("failed" in statuses)
    if config.plan:
        return failed
    if processes.rank():  # a launcher ends the first process when another one fails
        return 0
    from twinbench.records import tracking  # seconds of imports that planning need not pay
    from twinbench.report.make import make

    folder, group = Path(config.results_dir).expanduser(), Path(config.hydra.sweep.dir).name
    suites = list(dict.fromkeys(job.suite for job in jobs if job.suite))
    experiment = config.hydra.runtime.choices["experiment"]
    reports = [{"suite": suite} for suite in suites]
    if experiment and experiment not in suites:  # one that has a suite's name is about the whole suite
        store.write_sweep(folder, experiment, sorted({job.run_id for job in jobs if job.run_id}))
        reports = [{"experiment": experiment}]
    for which in reports:
        try:
            made = make(folder, **which)
        except (ValueError, OSError) as error:  # such as: every job failed before it had a record
            print(f"error: no report of {' '.join(*which.items())}: {error}", file=sys.stderr, flush=True)
            return 1
        print(f"report: {made['folder'] / 'index.html'}", flush=True)
        tracking.log_report(made, mode=config.wandb.mode, folder=folder, project=config.wandb.project, group=group)
    return failed
