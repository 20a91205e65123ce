"""What happens before the jobs of a sweep begin, and when they have ended: checks; report, W&B run and exit code.

Hydra calls it, so it is the same under every sweeper and launcher. Each job leaves an ``outcome.json`` in its folder.
"""

import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from twinbench.plan import preflight
from twinbench.records import store
from twinbench.records.seconds import words
from twinbench.system import processes
from twinbench.system.claims import claimed
from twinbench.system.ending import interrupt_first
from twinbench.system.errors import MISTAKES, one_line
from twinbench.system.files import check_writable
from twinbench.system.mistakes import Mistake

ONE = ("results_dir", "plan", "wandb", "wandb.mode", "wandb.project")  # keys that a sweep has one value of
OUTCOME = "outcome.json"
NO_FILES = ("hydra.output_subdir=null", "hydra.job_logging.root=null", "hydra.sweep.dir=.", "hydra.sweep.subdir=.")


@dataclass(frozen=True)
class Outcome:
    """How one run ended. It casts to float, as sweepers that optimize want it.

    Attributes:
        status: planned or done (under ``plan=true``), skipped, ok or failed.
        suite, run_id: None where the run could not be planned.
        score: of a run on the validation split, the mean of its tasks' primary metrics.
        seconds: of a planned run, what runs like it took.
    """

    status: str
    suite: str | None = None
    run_id: str | None = None
    score: float | None = None
    seconds: float | None = None

    def __float__(self) -> float:
        """The score; a Mistake without one, by which Optuna's sweeper knows a failed trial (it dies of a NaN)."""
        if self.score is None:
            raise Mistake(f"no score to optimize by (status {self.status}): it takes split=validation, never the test")
        return self.score


class Sweep(Callback):
    """What Hydra calls around a sweep. It exits where something is wrong, since Hydra only warns of what it raises."""

    def on_multirun_start(self, config: DictConfig, **_) -> None:
        """Check the sweep as a whole before it makes a folder; each job is checked in its turn."""
        try:
            check(config)
            if config.plan or processes.rank():  # neither writes files
                config.hydra.sweep.dir = "."
                config.hydra.overrides.hydra.extend(NO_FILES)  # which the jobs are composed with
            else:
                for old in Path(config.hydra.sweep.dir).rglob(OUTCOME):  # of a sweep that was given the same folder
                    old.unlink()
        except MISTAKES as error:
            sys.exit(f"error: {one_line(error)}")

    def on_job_end(self, config: DictConfig, job_return, **_) -> None:
        """Leave the job's outcome in its folder, also if an error outside the run ended the job."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        done = outcome(job_return)
        if not config.plan and processes.rank() == 0:
            folder = Path(config.hydra.runtime.output_dir)
            try:
                (folder / OUTCOME).write_text(json.dumps(asdict(done)) + "\n", encoding="utf-8")
                add_to_experiment(config, done)
            except (Mistake, OSError) as error:
                sys.exit(f"error: {one_line(error)}")

    def on_multirun_end(self, config: DictConfig, **_) -> None:
        """Report on the sweep; exit with 1 if a job or the report failed."""
        if config.plan or processes.rank():  # a launcher ends the first process when another one fails
            return
        folder = Path(config.hydra.sweep.dir)
        files = sorted(folder.rglob(OUTCOME), key=lambda file: (len(file.parent.name), file))  # 2 is before 10
        try:
            code = finish(config, [Outcome(**json.loads(file.read_text(encoding="utf-8"))) for file in files])
        except Exception:
            traceback.print_exc()
            code = 1
        if code:
            sys.exit(code)


def check(config: DictConfig) -> None:
    """Find what is wrong with a sweep as a whole.

    Raises:
        ValueError: one line with the key, the value and what is legal.
    """
    for override in OverridesParser.create().parse_overrides(list(config.hydra.overrides.task)):
        if override.key_or_group in ONE and override.is_sweep_override():
            raise Mistake(
                f"{override.key_or_group} has several values, and a sweep has one; sweep over what is measured"
            )
    whole = OmegaConf.to_container(OmegaConf.masked_copy(config, preflight.SETTINGS), resolve=True)
    preflight.settings(whole)


def make_folder(config: DictConfig) -> None:
    """Make the sweep's own folder, or raise OSError where records could not be written either."""
    check_writable(Path(config.results_dir).expanduser())
    Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)


def outcome(job_return) -> Outcome:
    """How a job ended, by what Hydra has of it; one that died of an error has failed."""
    try:
        return job_return.return_value
    except Exception:
        traceback.print_exc()
        return Outcome("failed")


@contextmanager
def counted(config: DictConfig) -> Iterator[None]:
    """Let an interrupt between two jobs say how many are done, as one inside a job does: each job has a folder."""
    try:
        with interrupt_first():
            yield
    except KeyboardInterrupt as stop:
        begun = [folder for folder in Path(config.hydra.sweep.dir).glob("*") if folder.name.isdigit()]
        raise stop if str(stop) or config.plan else type(stop)(f"{len(begun)} done, the same command goes on") from None


def tally(outcomes: Sequence[Outcome]) -> int:
    """Print how many jobs ended in which way; the exit code, which is 1 if one failed."""
    statuses = [job.status for job in outcomes]
    times = [job.seconds for job in outcomes if job.seconds is not None]
    some = f"{len(times)} of them " if len(times) < statuses.count("planned") else ""
    took = f": {some}about {words(sum(times))} without training, as earlier runs on the same rows took" if times else ""
    print(", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)) + took, flush=True)
    return int("failed" in statuses)


def add_to_experiment(config: DictConfig, done: Outcome) -> None:
    """Add a run to those of its experiment: a report can be made while the sweep runs, and after it was stopped.

    Runs of the suite that the experiment has its name from are known without.
    """
    experiment = config.hydra.runtime.choices["experiment"]
    if experiment and done.run_id is not None and experiment != done.suite:
        store.add_to_sweep(Path(config.results_dir).expanduser(), experiment, done.run_id)


def finish(config: DictConfig, outcomes: Sequence[Outcome]) -> int:
    """Report on a sweep whose jobs have ended; the exit code: 1 if a job failed, or the report."""
    failed = tally(outcomes)
    from twinbench.records import tracking  # seconds of imports that planning need not pay
    from twinbench.report.make import make

    folder, group = Path(config.results_dir).expanduser(), Path(config.hydra.sweep.dir).name
    suites = list(dict.fromkeys(job.suite for job in outcomes if job.suite is not None))
    experiment = config.hydra.runtime.choices["experiment"]
    reports = [{"suite": suite} for suite in suites]
    if experiment and experiment == config.suite.name:  # it is about the whole suite, whose runs name it
        reports = [{"suite": experiment}]
    elif experiment:
        runs = sorted({job.run_id for job in outcomes if job.run_id is not None})
        if runs:  # where every job was refused, what the last sweep listed stays
            store.write_sweep(folder, experiment, runs)
        reports = [{"experiment": experiment}]
    for which in reports:
        try:
            # Of sweeps that share their runs the last one reports on all: it waits for the others' report here.
            with claimed(folder / "reports" / next(iter(which.values())), wait=True):
                made = make(folder, **which)
        except (Mistake, OSError) as error:  # such as: every job failed before it had a record
            print(f"error: no report of {' '.join(*which.items())}: {error}", file=sys.stderr, flush=True)
            return 1
        print(f"report: {made['folder'] / 'index.html'}", flush=True)
        tracking.log_report(made, mode=config.wandb.mode, folder=folder, project=config.wandb.project, group=group)
    return failed
