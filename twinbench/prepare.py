"""From a job to the objects that it needs: data, experts, a suite on a workbench, a method and its router."""

import functools
import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas as pd
from hydra.utils import instantiate
from torch import Tensor

from twinbench import benchmark
from twinbench.assets.sources import fetch
from twinbench.merging.method import Method
from twinbench.plan.identity import expert_folder, hashed
from twinbench.plan.job import Job
from twinbench.plan.signature import NAMED
from twinbench.plan.suite import merged, own_experts, recipe, scaled, scored
from twinbench.protocol import PROTOCOLS
from twinbench.records import provenance, store
from twinbench.routing.learned import Setting
from twinbench.routing.recipe import Features, Recipe, Use
from twinbench.suite import Suite, Task
from twinbench.system import cached, processes
from twinbench.system.device import check_bfloat16, picked
from twinbench.system.memory import keep_freed
from twinbench.system.mistakes import Mistake
from twinbench.tasks.corrupted import mistyped
from twinbench.weights.state_dict import StateDict
from twinbench.workbench import Workbench


def measured(job: Job, bench: Workbench) -> tuple[list[dict], pd.DataFrame]:
    """The rows and the predictions of a job, as `benchmark.run` gives them."""
    return benchmark.run(bench, setting(job, bench), PROTOCOLS[job.protocol], job.split)


def exported(job: Job, bench: Workbench, origins: Mapping[str, str], rows: list[dict]) -> None:
    """Write the job's merged model to the folder ``export``."""
    from twinbench.export.folder import export

    export(Path(job.config["export"]), job, bench, setting(job, bench), origins, rows)


def checked(job: Job) -> None:
    """Find what is wrong with the job's numbers before anything is fetched or trained.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    router(job)
    benchmark.validate(merged(job.config["suite"]), method(job, None))


def workbench(job: Job, limit: int) -> Workbench:
    """The job's suite, opened, on a workbench that remembers up to ``limit`` bytes."""
    from transformers.utils import logging

    keep_freed()
    logging.set_verbosity_error()  # a new head's missing weights are the point of fine-tuning, not a warning
    logging.disable_progress_bar()
    config, device = job.config, picked(job.config["device"])
    if config["precision"] == "bfloat16":
        check_bfloat16(device, "precision=bfloat16", "precision=float32")
    suite = opened(config["suite"], device, config["split"])
    return Workbench(suite, device, config["batch_size"], limit, config["precision"])


def setting(job: Job, bench: Workbench) -> Setting:
    """The job's method on the bench, and the router that it asks."""
    protocol, asked = PROTOCOLS[job.protocol], None
    if job.route in ("router", "top1") or not protocol.knows_task:
        asked = router(job)
    seed = job.seed if asked else None
    return Setting(method(job, bench), job.route, asked, seed, protocol.gold_biases)


def router(job: Job) -> Recipe | None:
    """The router of the configuration; None where it has none, as the known task is the route."""
    leaves = job.config["router"]
    if leaves["model"] is None:
        return None
    return Recipe(Features(**leaves["features"]), instantiate(leaves["model"]), Use(**leaves["use"]))


def method(job: Job, bench: Workbench | None, which: str = "method") -> Method:
    """The job's method with its hyperparameters bound, and its shared expert's method if it has one.

    Args:
        bench: what prepared arguments are measured on; None: they give nothing, for a merge of models without tensors.
    """
    leaf, bound = job.leaves[which], {}
    if "seed" in leaf.takes.arguments:
        bound["seed"] = job.seed
    for name in leaf.takes.arguments & NAMED:
        make = importlib.import_module(f"twinbench.prepared.{name}").prepare
        bound[name] = make(bench) if bench else _nothing
    merge = functools.partial(instantiate({"_target_": leaf.target, "_partial_": True, **leaf.values}), **bound)
    shared = method(job, bench, "shared") if "shared" in leaf.takes.arguments else None
    key = hashed([leaf.target, leaf.values, job.seed if leaf.draws else None, shared.key if shared else None])
    form = getattr(importlib.import_module(leaf.target.rpartition(".")[0]), "factored", None)
    form = functools.partial(form, **leaf.values, **bound) if form else None
    return Method(key, leaf.name, merge, leaf.takes.role, leaf.takes.route, shared, form)


def keep_training(job: Job, tasks: Mapping[str, Task] | None = None) -> None:
    """Copy how the suite's experts were trained from the cache to the results, for their report.

    Args:
        tasks: of the suite, where they have been read.
    """
    suite = job.config["suite"]
    if provenance.trained(suite):
        whole = read(suite) if tasks is None or cuts(suite, job.config["split"]) else tasks
        training = provenance.training(suite, whole)
        store.write_experts(job.results_dir, job.suite_id, training)


def cuts(suite: Mapping, split: str) -> bool:
    """Whether the suite's limit leaves out held-out rows, as it does where these are scored."""
    return split == "validation" and suite["limit"] is not None


def opened(suite: Mapping, device: str, split: str = "test") -> Suite:
    """Fetch a suite's base, fine-tune or fetch its experts, and open them with its tasks.

    Args:
        split: that is to be scored, at most ``limit`` rows of a task.
    """
    kind, tasks = workload(suite), read(suite)
    base, words = fetch(suite["base"]), _words(suite)
    if suite["checkpoints"] is not None:
        folders = {name: fetch(suite["checkpoints"][name]) for name in own_experts(suite)}
    else:
        recipes = _recipes(suite)
        folders = {
            name: kind.finetune(base, tasks[name], how, expert_folder(suite, name), device, words)
            for name, how in recipes.items()
        }
    if cuts(suite, split):
        tasks = read(suite, split)  # a training measures itself on all held-out rows
    settings = suite | {"merged": merged(suite)}
    found = kind.open_suite(base, folders, tasks, kind.open_tokenizer(words), settings, kind)
    return _scaled(replace(found, scored=scored(suite)), scaled(suite))


def _scaled(suite: Suite, factors: Mapping[str, float]) -> Suite:
    """The suite with the task vectors of some experts multiplied: ``base + factor * (expert - base)``."""

    def moved(task: str, name: str) -> Tensor:
        origin = suite.base[name]
        return (origin + factors[task] * (suite.experts[task][name] - origin)).to(origin.dtype)

    farther = {task: StateDict(suite.base, lambda name, task=task: moved(task, name)) for task in factors}
    return replace(suite, experts={**suite.experts, **farther}) if farther else suite


def read(suite: Mapping, split: str = "test") -> dict[str, Task]:
    """Fetch and read the data of a suite's tasks, with at most ``limit`` rows of the split that is to be scored."""
    kind = workload(suite)
    tokenizer, tasks = kind.open_tokenizer(_words(suite)), {}
    for name, config in suite["tasks"].items():
        sources = {key: fetch(source) for key, source in config["sources"].items()}
        task = kind.read(name, config, sources, tokenizer, suite["limit"], split)
        tasks[name] = _corrupted(task, rate) if (rate := suite.get("corrupted")) else task
    return tasks


def _corrupted(task: Task, rate: float) -> Task:
    """The task with typing errors in what is scored; its training and held-out rows stay as they are."""
    scored = {split: frame for split, frame in task.splits.items() if split not in ("train", "validation")}
    typed = {split: mistyped(frame, task.columns, rate) for split, frame in scored.items()}
    return replace(task, splits={**task.splits, **typed})


def workload(suite: Mapping) -> ModuleType:
    """The suite's kind of model: `twinbench.workloads.NAME.workload`."""
    return importlib.import_module(f"twinbench.workloads.{suite['workload']}.workload")


def _words(suite: Mapping) -> Path:
    """The folder with the suite's tokenizer."""
    return fetch(suite.get("tokenizer") or suite["base"])


def _recipes(suite: Mapping) -> dict:
    """Per task with an expert how that is fine-tuned.

    Raises:
        ValueError: some are not trained yet, and several processes would train each.
    """
    own = own_experts(suite)
    untrained = [name for name in own if cached.damaged(expert_folder(suite, name))]
    if untrained and processes.count() > 1:
        raise Mistake(
            f"suite {suite['name']}: the experts {', '.join(untrained)} are not trained yet, or damaged, which "
            "one process mends: start it once without the launcher"
        )
    given = {name: recipe(suite, suite["tasks"][name]) for name in own}
    lists_as_tuples = {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in how.items()}
        for name, how in given.items()
    }
    return {name: workload(suite).Recipe(**how) for name, how in lists_as_tuples.items()}


def _nothing(*_) -> dict:
    return {}
