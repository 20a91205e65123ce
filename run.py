"""Run one configuration of the benchmark and write down its records; `-m` or an experiment sweeps many."""

from twinbench.system.ending import ended_well, importing, interrupt_first

if __name__ == "__main__":
    importing()

import functools
import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from twinbench.assets.sources import cache_dir, fetch
from twinbench.plan import preflight
from twinbench.plan.identity import expert_folder, origins
from twinbench.plan.job import Job, changed_since
from twinbench.plan.signature import draws, hyperparameters, signature
from twinbench.plan.suite import generative, head, merged, own_experts, recipe
from twinbench.records import provenance, store
from twinbench.system import cached, processes
from twinbench.system.errors import MISTAKES, one_line
from twinbench.system.mistakes import Mistake

MEASURED = (
    *("task", "metric", "primary", "value", "n", "merge_seconds", "router_seconds", "route_seconds", "eval_seconds"),
    *("shared_bytes", "exclusive_bytes", "exclusive_kind", "router_bytes", "peak_memory_bytes", "device"),
    *("data", "expert"),
)

OmegaConf.register_new_resolver("expanded", os.path.expanduser, replace=True)  # for Hydra's own folder, see config.yaml


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> dict[str, str]:
    """Run a composed configuration. In a sweep a failure is a record and a return value; alone it is the exit code."""
    job, alone = HydraConfig.get().job, HydraConfig.get().mode == RunMode.RUN
    try:
        with interrupt_first():
            done = run(cfg)
    except MISTAKES as error:
        complain(one_line(error), alone)
        done = {"status": "failed"}
    except KeyboardInterrupt as stop:
        raise stop if alone else type(stop)(f"{job.num} done, the same command goes on") from None
    if done["status"] == "failed" and alone and processes.rank() == 0:
        sys.exit(1)
    return done


def run(cfg: DictConfig) -> dict[str, str]:
    """Plan, skip or measure one configuration; its suite, run_id and status (planned, done, skipped, ok, failed)."""
    config, names, job = preflight.planned(cfg, HydraConfig.get().runtime.choices)
    if config["plan"] and generative(config["suite"]):
        from twinbench.plan import needs

        for line in needs.lines(config["suite"]):
            say_once(config["suite"]["name"], line)
    results_dir = Path(config["results_dir"])
    rows = store.read(results_dir)
    kept = [row for row in rows if row["run_id"] == job.run_id and row["status"] == "ok"]
    done = processes.of_first(bool(kept))
    since = None if done else changed_since(rows, job)
    why = f": its method's source has changed since the record of {since}" if since else ""
    said = {"suite": job.suite, "run_id": job.run_id}
    if config["plan"]:
        print(f"{'done   ' if done else 'to run '} {job.run_id}  {title(job)}{why}", flush=True)
        return said | {"status": "done" if done else "planned"}
    if done and not config["force"]:
        bare = "" if store.has_predictions(results_dir, job.run_id) else " without predictions, so no interval"
        print(f"skipped {job.run_id}  {title(job)}: it has a record{bare} (force=true runs it again)", flush=True)
        status = "skipped"
        said["suite"] = kept[-1]["suite"] if kept else job.suite  # as it was called then: the report is of that name
        keep_missing_training(config, job)
    else:
        print(f"running {job.run_id}  {title(job)}{why}", flush=True)
        status = record(cfg, config, job, names, describe(job, names["experiment"]))
    if config["export"] and status != "failed":
        publish(cfg, config, job, names)
    return said | {"status": status}


@functools.cache
def complain(mistake: str, alone: bool) -> None:
    """Tell a mistake once, although all the jobs of a sweep may have it, with the first job that has it."""
    which = "" if alone else f"{' '.join(HydraConfig.get().overrides.task)}: "
    print(f"error: {which}{mistake}", file=sys.stderr, flush=True)


@functools.cache
def say_once(suite: str, line: str) -> None:
    """Print what is needed by a suite, once for all the runs that are planned on it."""
    print(line, flush=True)


def title(job: Job) -> str:
    """The configuration in one line, with what was changed of its router, whose settings are many."""
    changed = (override for override in HydraConfig.get().overrides.task if override.startswith("router."))
    return " ".join([job.label, *changed])


def record(cfg: DictConfig, config: Mapping, job: Job, names: Mapping[str, str], identity: Mapping) -> str:
    """Measure one configuration and write down what came of it; say whether it went well (ok, failed)."""
    results_dir, origins = Path(config["results_dir"]), provenance.data(config["suite"])
    try:
        with interrupt_first():
            rows, predictions = measure(cfg, config, job, names)
    except Exception as error:  # whatever went wrong with one configuration is its record, and the sweep goes on
        rows = [failure(identity, error)]
        store.write(results_dir, rows)
        track(rows, config, results_dir)
        if not isinstance(error, MISTAKES):
            traceback.print_exc()
            if processes.count() > 1:
                sys.exit(1)  # the others may be waiting for this one, so the launcher has to end them
        print(f"error: {title(job)}: {one_line(error)}", file=sys.stderr, flush=True)
        return "failed"
    experts, well = provenance.experts(config["suite"]), {"status": "ok", "error": None}
    where = {task: {"data": origin, "expert": experts.get(task)} for task, origin in origins.items()}
    rows = [identity | well | row | where[row["task"]] for row in rows]
    store.write(results_dir, rows, predictions)
    print("  " + "  ".join(f"{r['task']} {r['metric']} {r['value']:.4f}" for r in rows if r["primary"]), flush=True)
    track(rows, config, results_dir)
    return "ok"


def track(rows: list[dict], config: Mapping, results_dir: Path) -> None:
    """Mirror the records of a run to Weights & Biases; the runs of a sweep form a group."""
    if config["wandb"]["mode"] != "disabled" and processes.rank() == 0:  # spares its imports
        from twinbench.records import tracking

        group = Path(HydraConfig.get().sweep.dir).name if HydraConfig.get().mode == RunMode.MULTIRUN else None
        tracking.log_run(rows, config, folder=results_dir, group=group, **config["wandb"])


def measure(cfg: DictConfig, config: Mapping, job: Job, names: Mapping[str, str]):
    """Benchmark the configuration; the first line here that imports torch."""
    from twinbench import benchmark

    return benchmark.run(*prepare(cfg, config, job, names), job.split)


def publish(cfg: DictConfig, config: Mapping, job: Job, names: Mapping[str, str]) -> None:
    """Export what was measured as a folder for plain transformers and PEFT."""
    from twinbench.export.folder import export

    folder, rows = Path(config["export"]), store.read(Path(config["results_dir"]))
    export(folder, job, origins(config["suite"]), rows, *prepare(cfg, config, job, names))
    print(f"exported {job.run_id}  to {folder}", flush=True)


def prepare(cfg: DictConfig, config: Mapping, job: Job, names: Mapping[str, str]) -> tuple:
    """Instantiate the leaves of the configuration: the arguments of `benchmark.run`."""
    from transformers.utils import logging

    from twinbench import benchmark
    from twinbench.system.memory import keep_freed

    keep_freed()
    logging.set_verbosity_error()  # a new head's missing weights are the point of fine-tuning, not a warning
    logging.disable_progress_bar()
    router, method = instantiate(cfg.router), make_method(cfg, config, names, job.seed)
    benchmark.validate(merged(config["suite"]), method, router, job.protocol)
    device = pick_device(config["device"])
    suite = open_suite(json.dumps(config["suite"]), device)
    keep_training(config, job)
    return suite, method, router, job.protocol, job.seed, device, config["batch_size"]


def make_method(cfg: DictConfig, config: Mapping, names: Mapping[str, str], seed: int | None, group: str = "method"):
    """The method of a config group with its hyperparameters bound, and its shared expert's method if it has one."""
    from twinbench.merging.method import Method
    from twinbench.prepared.basis import remembered

    takes, values = signature(config[group]["_target_"]), hyperparameters(config[group])
    merge = instantiate(cfg[group])
    if "seed" in takes.arguments:
        merge = functools.partial(merge, seed=seed)
    if draws(takes, values):
        values |= {"seed": seed}
    if "basis" in takes.arguments:
        basis = remembered(cache_dir() / "factors", pick_device(config["device"]))
        merge = functools.partial(merge, basis=basis)
    shared = make_method(cfg, config, names, seed, "shared") if "shared" in takes.arguments else None
    values |= {"_target_": config[group]["_target_"]} | ({"shared": shared.identity} if shared else {})
    return Method(f"{names[group]} {json.dumps(values, sort_keys=True)}", merge, takes.route, shared)


def keep_training(config: Mapping, job: Job) -> None:
    """Copy how the suite's experts were trained from the cache to the results, for their report."""
    if provenance.trained(config["suite"]):
        training = provenance.training(config["suite"], load_tasks(json.dumps(config["suite"])))
        store.write_experts(Path(config["results_dir"]), job.suite_id, training)


def keep_missing_training(config: Mapping, job: Job) -> None:
    """Keep the training for a suite whose records are older than this file of the results, where it is still cached.

    What is to be skipped is done, so data that cannot be fetched any more does not make it fail.
    """
    if store.experts(Path(config["results_dir"]), job.suite_id) is None:
        try:
            keep_training(config, job)
        except MISTAKES as error:
            print(f"no learning curves for the report: {one_line(error)}", file=sys.stderr, flush=True)


@functools.lru_cache(maxsize=1)
def load_tasks(suite_json: str):
    """Fetch and read the data of a suite's tasks; once for a sweep."""
    from twinbench import suite
    from twinbench.workloads.classification import data as task
    from twinbench.workloads.generation import data as language

    config, tasks = json.loads(suite_json), {}
    causal = generative(config)
    tokenizer = suite.open_tokenizer(fetch(config.get("tokenizer") or config["base"])) if causal else None
    for name, spec in config["tasks"].items():
        sources = {key: fetch(source) for key, source in spec["sources"].items()}
        rest = {key: value for key, value in spec.items() if key not in ("sources", "data", "finetune")}
        rest |= {"name": name, "limit": config.get("limit")}
        if causal:
            tasks[name] = language.load_task(tokenizer, sources, **rest)
        else:
            tasks[name] = task.load_task(instantiate(spec["data"]), sources, **rest)
    return tasks


@functools.lru_cache(maxsize=1)
def open_suite(suite_json: str, device: str):
    """Fetch a suite's base, fine-tune or fetch its experts, and open them with its tasks; once for a sweep."""
    from twinbench import suite
    from twinbench.workloads.classification import finetune
    from twinbench.workloads.generation import finetune as instruct

    config = json.loads(suite_json)
    base, tasks = fetch(config["base"]), load_tasks(suite_json)
    own = {name: config["tasks"][name] for name in own_experts(config)}
    words = {"tokenizer_folder": fetch(config["tokenizer"])} if config.get("tokenizer") else {}
    if config["checkpoints"] is not None:
        folders = {name: fetch(config["checkpoints"][name]) for name in own}
    else:
        how = {name: recipe(config, spec) for name, spec in own.items()}
        untrained = [name for name in how if cached.damaged(expert_folder(config, name))]
        if untrained and processes.count() > 1:
            raise Mistake(
                f"suite {config['name']}: the experts {', '.join(untrained)} are not trained yet, or damaged, which "
                "one process mends: start it once without the launcher"
            )
        trainer, listed = (instruct, "targets") if generative(config) else (finetune, "freeze")
        recipes = {name: trainer.Recipe(**given | {listed: tuple(given[listed])}) for name, given in how.items()}
        folders = {
            name: trainer.finetune(base, tasks[name], recipe, expert_folder(config, name), device, **words)
            for name, recipe in recipes.items()
        }
    opened, given = suite.open_suite, {"head": head(config)}
    if generative(config):
        opened, given = suite.open_causal_suite, {key: config[key] for key in ("factored", "dtype", "device_map")}
    return opened(config["name"], base, folders, tasks, merged(config), **given, **words)


def pick_device(asked: str | None) -> str:
    """The device asked for, which must be there; by default a GPU where there is one."""
    import torch

    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and processes.count() > 1:
        asked = f"cuda:{processes.local_rank()}"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise Mistake(f"device={asked}: torch {torch.__version__} sees no CUDA device; use device=cpu or leave it out")
    return asked


def describe(job: Job, experiment: str | None) -> dict:
    """The fields of a record that say what was run, with what, and when."""
    commit, dirty = provenance.commit()
    fields = {key: value for key, value in asdict(job).items() if key != "route"}
    return fields | {
        "time": datetime.now(UTC).isoformat(),
        "commit": commit,
        "dirty": dirty,
        "experiment": experiment,
        "versions": provenance.versions(),
    }


def failure(identity: Mapping, error: Exception) -> dict:
    """The record of a run that did not end well."""
    said = f"{type(error).__name__}: {one_line(error)}"
    return {**identity, "status": "failed", "error": said} | dict.fromkeys(MEASURED)


if __name__ == "__main__":
    if processes.rank():  # the first process speaks for all; errors are everybody's
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.environ["TQDM_DISABLE"] = "1"
    ended_well(main, kept="what was finished is kept, experts and downloads too, and the same command goes on")
