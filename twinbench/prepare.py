"""From a job to the objects that it needs: data, experts, suite, method, router. And what is done with them."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from hydra.utils import instantiate

from twinbench import benchmark, suite
from twinbench.assets.sources import cache_dir, fetch
from twinbench.merging.method import Method
from twinbench.plan.identity import expert_folder
from twinbench.plan.job import Job, Leaf
from twinbench.plan.suite import generative, head, merged, own_experts, recipe
from twinbench.prepared.basis import remembered
from twinbench.records import provenance, store
from twinbench.system import cached, processes
from twinbench.system.device import picked
from twinbench.system.memory import keep_freed
from twinbench.system.mistakes import Mistake
from twinbench.workloads.classification import data as task
from twinbench.workloads.classification import finetune
from twinbench.workloads.generation import data as language
from twinbench.workloads.generation import finetune as instruct


def measured(job: Job):
    """The rows and the predictions of a job, as `benchmark.run` gives them."""
    return benchmark.run(*prepared(job), job.split)


def exported(job: Job, origins: Mapping[str, str], rows: list[dict]) -> None:
    """Write the job's merged model to the folder ``export``."""
    from twinbench.export.folder import export

    export(Path(job.config["export"]), job, origins, rows, *prepared(job))


def prepared(job: Job) -> tuple:
    """The arguments of `benchmark.run`."""
    from transformers.utils import logging

    keep_freed()
    logging.set_verbosity_error()  # a new head's missing weights are the point of fine-tuning, not a warning
    logging.disable_progress_bar()
    device = picked(job.config["device"])
    router, made = instantiate(job.config["router"]), method(job.leaves, job, device)
    benchmark.validate(merged(job.config["suite"]), made, router, job.protocol)
    opened = open_suite(json.dumps(job.config["suite"]), device)
    keep_training(job)
    return opened, made, router, job.protocol, job.seed, device, job.config["batch_size"]


def method(leaves: Mapping[str, Leaf], job: Job, device: str, which: str = "method") -> Method:
    """The method with its hyperparameters bound, and its shared expert's method if it has one."""
    leaf, bound = leaves[which], {}
    if "seed" in leaf.takes.arguments:
        bound["seed"] = job.seed
    if "basis" in leaf.takes.arguments:
        bound["basis"] = remembered(cache_dir() / "factors", device)
    merge = functools.partial(instantiate({"_target_": leaf.target, "_partial_": True, **leaf.values}), **bound)
    shared = method(leaves, job, device, "shared") if "shared" in leaf.takes.arguments else None
    values = {"_target_": leaf.target, **leaf.values} | ({"seed": job.seed} if leaf.draws else {})
    values |= {"shared": shared.identity} if shared else {}
    return Method(f"{leaf.name} {json.dumps(values, sort_keys=True)}", merge, leaf.takes.route, shared)


def keep_training(job: Job) -> None:
    """Copy how the suite's experts were trained from the cache to the results, for their report."""
    config = job.config["suite"]
    if provenance.trained(config):
        training = provenance.training(config, load_tasks(json.dumps(config)))
        store.write_experts(job.results_dir, job.suite_id, training)


@functools.lru_cache(maxsize=1)
def load_tasks(suite_json: str):
    """Fetch and read the data of a suite's tasks; once for a sweep."""
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
