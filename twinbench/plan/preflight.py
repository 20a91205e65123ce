"""What can be wrong with a composed configuration, found before a folder is made or a weight is read; no torch."""

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from twinbench.assets.sources import found, unpinned
from twinbench.plan import targets
from twinbench.plan.exportable import check_export
from twinbench.plan.job import Job, configured
from twinbench.plan.refused import check_precision
from twinbench.plan.signature import checked_signature, hyperparameters
from twinbench.plan.suite import narrowed, workload, workloads
from twinbench.system import processes
from twinbench.system.device import PRECISIONS
from twinbench.system.errors import MISTAKES, one_line
from twinbench.system.files import check_writable
from twinbench.system.mistakes import Mistake, check_name, one_of

DEVICE = re.compile(r"cpu|cuda(:\d+)?")
WANDB = ("offline", "online", "disabled")
SEEDS = 2**32  # numpy takes no larger ones
SETTINGS = (
    "seed",
    "device",
    "precision",
    "batch_size",
    "workbench_bytes",
    "results_dir",
    "export",
    "force",
    "plan",
    "allow",
    "wandb",
)  # a run's own
SUITE = (
    "name",
    "workload",
    "base",
    "tasks",
    "finetune",
    "checkpoints",
    "only",
    "merged",
    "scored",
    "limit",
    "scaled",
)  # its keys
ROUTER = {"features": "twinbench.routing.recipe.Features", "use": "twinbench.routing.recipe.Use"}  # and ``model``
OFFSET = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text")


class Preflight(Callback):
    """Checks a run before Hydra makes a folder for it. It exits, since Hydra only warns of what a callback raises."""

    def on_run_start(self, config: DictConfig, **_) -> None:
        try:
            found = planned(config, config.hydra.runtime.choices).config
            if found["plan"]:  # writes nothing
                config.hydra.run.dir, config.hydra.output_subdir, config.hydra.job_logging.root = ".", None, None
            else:
                check_writable(Path(found["results_dir"]))
        except MISTAKES as error:
            sys.exit(f"error: {one_line(error)}")


def planned(cfg: DictConfig, choices: Mapping[str, str | None]) -> Job:
    """What a composed configuration stands for, with the tasks that its suite keeps.

    Raises:
        ValueError, OSError: what is wrong with it, in one line.
    """
    config, names = composed(cfg, choices)
    check(config, names)
    check_precision(config)
    config["suite"] = narrowed(config["suite"])
    job = configured(config, names)
    if config["export"]:
        if processes.count() > 1:
            raise Mistake(f"export={config['export']}: one process exports; start it without the launcher")
        check_export(job, Path(config["export"]), config["suite"])
    return job


def composed(cfg: DictConfig, choices: Mapping[str, str | None]) -> tuple[dict, dict[str, str | None]]:
    """The resolved configuration without Hydra's part, and the chosen file of each config group.

    Folders begin at the user's home where they begin with ``~``.
    """
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    config = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    for key in ("results_dir", "export"):
        if isinstance(config[key], str):
            config[key] = os.path.expanduser(config[key])
    groups = {"method": "method", "shared": "method@shared", "router": "router", "experiment": "experiment"}
    return config, {name: choices.get(group) for name, group in groups.items()}


def check(config: Mapping, names: Mapping[str, str]) -> None:
    """Find what is wrong with a resolved configuration, whatever becomes of its files.

    Args:
        names: the chosen file of each config group: ``method``, ``shared``, ``router``, ``experiment``.

    Raises:
        ValueError: one line with the key, the value and what is legal.
    """
    settings(config)
    for group in ("method", "shared"):
        leaf = config.get(group)
        if not isinstance(leaf, Mapping) or "_target_" not in leaf:
            raise Mistake(f"{group} must be one of the choices of python run.py --help, got {leaf!r}")
    targets.check(config, config["allow"])
    if names["experiment"]:
        check_name("experiment", names["experiment"])
    for group in ("method", "shared"):
        checked_signature(names[group], config[group])
        targets.check_kinds(group, hyperparameters(config[group]), targets.arguments(config[group]["_target_"]))
    _router(config.get("router"))
    suite(config["suite"])


def settings(config: Mapping) -> None:
    """Find what is wrong with the keys that are the run's own."""
    for key, kind in (("force", "bool"), ("plan", "bool"), ("allow", "list[str]")):
        targets.check_kind(key, config[key], kind)
    check_seed("seed", config["seed"])
    one_of("precision", config["precision"], PRECISIONS)
    whole("batch_size", config["batch_size"])
    if config["workbench_bytes"] is not None:
        whole("workbench_bytes", config["workbench_bytes"], " or null")
    if config["device"] is not None and not DEVICE.fullmatch(str(config["device"])):
        raise Mistake(f"device must be cpu, cuda, cuda:N or null, got {config['device']!r}")
    _mapping("wandb", config["wandb"])
    one_of("wandb.mode", config["wandb"]["mode"], WANDB)
    targets.check_kind("wandb.project", config["wandb"]["project"], "str")
    if not isinstance(config["results_dir"], str) or not config["results_dir"]:
        raise Mistake(f"results_dir must be a folder, got {config['results_dir']!r}")
    if not isinstance(config["export"], str | None) or config["export"] == "":
        raise Mistake(f"export must be a new folder or null, got {config['export']!r}")


def suite(config: Mapping) -> None:
    """Find what is wrong with a suite and its tasks: keys, names, kinds of values, recipes."""
    _mapping("suite", config)
    for key in ("workload", *SUITE):
        if key not in config:
            first = f"begin its defaults with /workload@_here_: {' or '.join(workloads())}, which has the general ones"
            raise Mistake(f"suite lacks {key}; {first}")
    kind = workload(config)
    for key in config:
        one_of("key of suite", key, (*SUITE, *kind.KEYS, "revision"))
    for key in kind.KEYS:
        if key not in config:
            raise Mistake(f"suite lacks {key}; begin its defaults with /workload@_here_: {config['workload']}")
    kind.check(config)
    check_name("suite.name", config["name"])
    for key in ("only", "merged", "scored"):
        value = config[key]
        if not (value is None or isinstance(value, list)):
            raise Mistake(f"suite.{key} must be a list of tasks or null, as in suite.{key}=[{value}]; got {value!r}")
    if config["limit"] is not None:
        whole("suite.limit", config["limit"], " or null")
    if config["scaled"] is not None:
        _mapping("suite.scaled", config["scaled"], " such as {rte: 2}, or be null")
    _mapping("suite.tasks", config["tasks"])
    for name, spec in config["tasks"].items():
        check_name("task", name)
        _mapping(f"suite.tasks.{name}", spec)
    _mapping("suite.base", config["base"], " such as {path: DIR}")
    if config["checkpoints"] is not None:
        _mapping("suite.checkpoints", config["checkpoints"], " or be null")
        for name, source in config["checkpoints"].items():
            _mapping(f"suite.checkpoints.{name}", source, " such as {path: DIR}")
    positions = _positions(config["base"])
    for name, spec in config["tasks"].items():
        _task(f"suite.tasks.{name}", spec, kind)
        if positions and spec["max_length"] > positions:
            key = f"suite.tasks.{name}.max_length"
            raise Mistake(f"{key} must be at most {positions}, the base's positions, got {spec['max_length']}")
    _recipes(config, kind)


def check_seed(key: str, value: object) -> None:
    if type(value) is not int or not 0 <= value < SEEDS:
        raise Mistake(f"{key} must be a whole number in [0, 2^32), got {value!r}")


def whole(key: str, value: object, otherwise: str = "") -> None:
    """Raise ValueError unless a value is a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise Mistake(f"{key} must be a whole number of at least 1{otherwise}, got {value!r}")


def _router(config: object) -> None:
    """Check the three leaves of a router; all are null where the known task is the route."""
    if not isinstance(config, Mapping) or not {*ROUTER, "model"} <= set(config):
        raise Mistake(f"router must be one of the choices of python run.py --help, got {config!r}")
    for key in config:
        one_of("key of router", key, ("features", "model", "use"))
    if config["model"] is None:
        return
    _mapping("router.model", config["model"])
    for leaf in ("features", "model", "use"):
        _mapping(f"router.{leaf}", config[leaf])
        known = targets.arguments(ROUTER.get(leaf) or config["model"]["_target_"])
        targets.check_values(f"router.{leaf}", hyperparameters(config[leaf]), known)


def _task(place: str, spec: Mapping, kind: ModuleType) -> None:
    taken = dict(targets.arguments(kind.SPEC))
    for key, required in (("sources", True), ("finetune", False), *((("data", True),) if kind.LOADED else ())):
        taken[key] = targets.Argument("mapping", required)
    targets.check_values(place, spec, taken)
    whole(f"{place}.max_length", spec["max_length"])
    rows = dict.fromkeys(("train", "validation", "test"), targets.Argument("int | None", True))
    if kind.LOADED:  # its validation rows are held out of the training data
        rows["validation"] = targets.Argument("int", True)
    _mapping(f"{place}.rows", spec["rows"])
    targets.check_values(f"{place}.rows", spec["rows"], rows)
    if kind.LOADED:
        if "_target_" not in spec["data"]:
            raise Mistake(f"{place}.data lacks _target_, a function of twinbench.tasks that reads the rows")
        loads = targets.arguments(spec["data"]["_target_"])
        for name in spec["sources"]:
            one_of(f"source of {place}", name, loads)
        own = {key: argument for key, argument in loads.items() if key not in spec["sources"]}
        targets.check_values(f"{place}.data", hyperparameters(spec["data"]), own)


def _recipes(config: Mapping, kind: ModuleType) -> None:
    """Check how each expert is fine-tuned: by the suite's recipe, and what a task changes of it."""
    if config["finetune"] is None:
        return
    taken = targets.arguments(kind.RECIPE)
    recipes = {"suite.finetune": (config["finetune"], taken)}
    changed = {key: replace(argument, required=False) for key, argument in taken.items()}
    for name, spec in config["tasks"].items():
        recipes[f"suite.tasks.{name}.finetune"] = (spec.get("finetune") or {}, changed)
    for place, (recipe, keys) in recipes.items():
        _mapping(place, recipe)
        targets.check_values(place, recipe, keys)
        check_seed(f"{place}.seed", recipe.get("seed", 0))


def _mapping(key: str, value: object, example: str = "") -> None:
    if not isinstance(value, Mapping):
        raise Mistake(f"{key} must map keys to values{example}, got {value!r}")


def _positions(base: Mapping) -> int | None:
    """How many tokens the base has positions for, where its configuration is on this machine."""
    path = None if unpinned(base) else found(base)  # the plan names all commits that lack, at once
    file = path / "config.json" if path and path.is_dir() else None
    if file is None or not file.exists():
        return None
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise Mistake(f"{file}: not a model's configuration, which is a JSON object ({error})") from error
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if positions and config.get("model_type") in OFFSET:  # their first positions are those of padding
        positions -= (config.get("pad_token_id") or 0) + 1
    return positions
