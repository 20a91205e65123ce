"""One run of the command: compose, check, skip or measure, write down."""

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from twinbench.plan import preflight
from twinbench.plan.identity import expert_folder, hashed, origins
from twinbench.plan.job import Job, changed_since
from twinbench.plan.suite import own_experts, workload
from twinbench.records import provenance, store
from twinbench.records.record import failure, finished, is_of
from twinbench.records.seconds import expected
from twinbench.sweep import Outcome
from twinbench.system import processes
from twinbench.system.claims import claimed_by_first
from twinbench.system.ending import interrupt_first
from twinbench.system.errors import MISTAKES, one_line

if TYPE_CHECKING:  # it imports torch
    from twinbench.workbench import Workbench

OmegaConf.register_new_resolver("expanded", os.path.expanduser, replace=True)  # for Hydra's own folder, see config.yaml

_bench: "tuple[tuple, Workbench] | None" = None  # what it was opened for, and the workbench
_told: set[str] = set()  # what this process has printed once for all its jobs


def main(cfg: DictConfig) -> Outcome:
    """Run a composed configuration. In a sweep a failure is a record and a return value; alone it is the exit code."""
    job, alone = HydraConfig.get().job, HydraConfig.get().mode == RunMode.RUN
    try:
        with interrupt_first():
            done = run(cfg)
    except MISTAKES as error:
        which = "" if alone else f"{' '.join(HydraConfig.get().overrides.task)}: "
        tell_once(one_line(error), f"error: {which}{one_line(error)}", sys.stderr)
        done = Outcome("failed")
    except KeyboardInterrupt as stop:
        raise stop if alone else type(stop)(f"{job.num} done, the same command goes on") from None
    if done.status == "failed" and alone and processes.rank() == 0:
        sys.exit(1)
    return done


def run(cfg: DictConfig) -> Outcome:
    """Plan, skip or measure one configuration."""
    job = preflight.planned(cfg, HydraConfig.get().runtime.choices)
    if job.config["plan"]:
        return told(job)
    status, other = "skipped", None
    if wanted(job):
        thing, export = job.results_dir / "records" / job.run_id, bool(job.config["export"])
        with claimed_by_first(thing, wait=export) as other:
            if other is None and wanted(job):  # another process may have finished it meanwhile
                print(f"running {job.run_id}  {title(job)}{why(job)}", flush=True)
                status = record(job)
    if other:
        print(f"skipped {job.run_id}  {title(job)}: {other} measures it", flush=True)
    elif status == "skipped":
        bare = "" if store.has_predictions(job.results_dir, job.run_id) else " without predictions, so no interval"
        print(f"skipped {job.run_id}  {title(job)}: it has a record{bare} (force=true runs it again)", flush=True)
        keep_missing_training(job)
    if job.config["export"] and status != "failed":
        publish(job)
    rows = [] if status == "failed" else store.finished(job.results_dir, job.run_id)
    suite = rows[-1]["suite"] if rows else job.suite  # as it was called then: the report is of that name
    scores = [row["value"] for row in rows if row["primary"] and row["split"] == "validation"]
    return Outcome(status, suite, job.run_id, sum(scores) / len(scores) if scores else None)


def told(job: Job) -> Outcome:
    """Say what a run would do, and what its suite needs."""
    suite = job.config["suite"]
    here = own_experts(suite) if suite["checkpoints"] is None else ()
    folders = {name: expert_folder(suite, name) for name in here}
    for line in workload(suite).needs(suite, folders):
        tell_once(f"{job.suite} {line}", line, sys.stdout)
    has = has_record(job)
    print(f"{'done   ' if has else 'to run '} {job.run_id}  {title(job)}{'' if has else why(job)}", flush=True)
    seconds = None if has else expected(store.read(job.results_dir), job)
    return Outcome("done" if has else "planned", job.suite, job.run_id, seconds=seconds)


def wanted(job: Job) -> bool:
    """Whether the run is to be measured: it has no record of these experts, or is forced."""
    return job.config["force"] or not processes.of_first(has_record(job))


def has_record(job: Job) -> bool:
    """Whether the run has a record of the experts that there are.

    To export it they are needed, so they are in the cache, or the run trains and measures them.
    """
    rows, suite = store.finished(job.results_dir, job.run_id), job.config["suite"]
    if job.config["export"] and suite["checkpoints"] is None and not provenance.trained(suite):
        return False
    return bool(rows) and not provenance.retrained(rows, suite)


def why(job: Job) -> str:
    """What has changed since the run's last record, for the line that announces it."""
    since = changed_since(store.read(job.results_dir), job)
    rows = store.finished(job.results_dir, job.run_id)
    if rows and provenance.retrained(rows, job.config["suite"]):
        return f": its experts have been trained anew since the record of {rows[-1]['time']}"
    return f": its method's source has changed since the record of {since}" if since else ""


def tell_once(what: str, line: str, stream) -> None:
    """Print a line, once for all the jobs of a sweep that have the same to say."""
    if what not in _told:
        _told.add(what)
        print(line, file=stream, flush=True)


def title(job: Job) -> str:
    """The configuration in one line, with what was changed of its router, whose settings are many."""
    changed = (override for override in HydraConfig.get().overrides.task if override.startswith("router."))
    return " ".join([job.label, *changed])


def record(job: Job) -> str:
    """Measure one configuration and write down what came of it; say whether it went well (ok, failed)."""
    from twinbench import prepare

    attempt = provenance.attempt(job)
    try:
        with interrupt_first():
            prepare.checked(job)
            bench = shared_bench(job)
            prepare.keep_training(job, bench.suite.tasks)
            rows, predictions = prepare.measured(job, bench)
    except Exception as error:  # whatever went wrong with one configuration is its record, and the sweep goes on
        rows = [failure(attempt, f"{type(error).__name__}: {one_line(error)}")]
        store.write(job.results_dir, rows)
        track(rows, job)
        if not isinstance(error, MISTAKES):
            traceback.print_exc()
            if processes.count() > 1:
                sys.exit(1)  # the others may be waiting for this one, so the launcher has to end them
        print(f"error: {title(job)}: {one_line(error)}", file=sys.stderr, flush=True)
        return "failed"
    rows = finished(attempt, rows, provenance.origins(job.config["suite"]))
    store.write(job.results_dir, rows, predictions)
    print("  " + "  ".join(f"{r['task']} {r['metric']} {r['value']:.4f}" for r in rows if r["primary"]), flush=True)
    track(rows, job)
    return "ok"


def shared_bench(job: Job) -> "Workbench":
    """The workbench of this process, opened anew for another suite or device.

    Launchers call one function per job, so a variable of the module is all that two jobs of a process can share.
    """
    global _bench
    from twinbench import prepare
    from twinbench.system.memory import budget, give_back

    config = job.config
    give_back()  # what the job before this one has freed
    alike = "device", "precision", "batch_size", "workbench_bytes"
    asked = hashed(config["suite"]), prepare.cuts(config["suite"], config["split"]), *(config[key] for key in alike)
    if _bench is None or _bench[0] != asked:
        _bench = None  # its memory goes before the next one is opened
        _bench = asked, prepare.workbench(job, budget(config["workbench_bytes"]))
    return _bench[1]


def track(rows: list[dict], job: Job) -> None:
    """Mirror the records of a run to Weights & Biases; the runs of a sweep form a group."""
    if job.config["wandb"]["mode"] != "disabled" and processes.rank() == 0:  # spares its imports
        from twinbench.records import tracking

        group = Path(HydraConfig.get().sweep.dir).name if HydraConfig.get().mode == RunMode.MULTIRUN else None
        tracking.log_run(rows, job.config, folder=job.results_dir, group=group, **job.config["wandb"])


def publish(job: Job) -> None:
    """Export what was measured as a folder for plain transformers and PEFT."""
    from twinbench import prepare

    bench, suite = shared_bench(job), job.config["suite"]
    own = provenance.experts(suite) if suite["checkpoints"] is None else {}
    rows = [row for row in store.read(job.results_dir) if is_of(row, own)]
    prepare.exported(job, bench, origins(suite), rows)
    print(f"exported {job.run_id}  to {job.config['export']}", flush=True)


def keep_missing_training(job: Job) -> None:
    """Keep the training for a suite whose records are older than this file of the results, where it is still cached.

    What is to be skipped is done, so data that cannot be fetched any more does not make it fail.
    """
    if store.experts(job.results_dir, job.suite_id) is None:
        from twinbench import prepare

        try:
            prepare.keep_training(job)
        except MISTAKES as error:
            print(f"no learning curves for the report: {one_line(error)}", file=sys.stderr, flush=True)
