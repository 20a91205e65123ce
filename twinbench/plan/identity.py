"""Identities: hashes of what changes a number, and of nothing else.

No path is in them, of a module as little as of a file: code counts by its source, files by their content.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from twinbench.assets.sources import HUB, cache_dir, fingerprint, unpinned
from twinbench.plan.signature import completed, signature
from twinbench.plan.suite import generative, head, merged, own_experts, recipe
from twinbench.system import source
from twinbench.system.mistakes import Mistake

LM_EVAL = Path(__file__).parents[1] / "tasks" / "lm_eval"
PREFIX = "twinbench_"  # and the name of a file there: one of our own lm-eval tasks
SCORING = ("metric_list", "process_results", "filter_list", "generation_kwargs", "repeats")  # they train no expert


def suite_identity(suite: Mapping) -> dict:
    """Everything about a suite that changes scores: contents of its sources, tasks, and how experts come about.

    Raises:
        ValueError: experts come from nowhere, from two places, or not for every task; a tokenizer for classifiers; a
            revision that is no commit.
    """
    who, checkpoints = f"suite {suite['name']}", suite["checkpoints"]
    if (suite["finetune"] is None) == (checkpoints is None):
        raise Mistake(f"{who}: set one of finetune and checkpoints, and the other to null")
    own = own_experts(suite)
    if checkpoints is not None and set(checkpoints) != set(own):
        raise Mistake(f"{who}: checkpoints are of {', '.join(checkpoints)}, tasks {', '.join(own)}")
    if suite.get("tokenizer") and not generative(suite):
        raise Mistake(f"{who}: tokenizer is for generative suites; classifiers have their base's")
    _check_commits(suite)
    causal = generative(suite)
    experts = _recipes(suite) if checkpoints is None else {name: fingerprint(checkpoints[name]) for name in own}
    return {
        "base": fingerprint(suite["base"]),
        "tokenizer": _tokenizer(suite),
        "experts": experts,
        "tasks": {name: task_identity(task) for name, task in suite["tasks"].items()},
        "order": list(suite["tasks"]),  # a router has its outputs in it
        "merged": merged(suite),
        "limit": suite.get("limit"),
        "head": None if causal else head(suite),
        "dtype": (suite.get("dtype") or "float32") if causal else None,
        "factored": bool(suite.get("factored")) if causal else None,
    }


def task_identity(task: Mapping) -> dict:
    """A task's settings, with the content of its sources, its loader and its lm-eval files in place of their names."""
    apart = ("sources", "data", "lm_eval", "finetune")
    identity = {key: value for key, value in task.items() if key not in apart and value is not None}
    identity["sources"] = {name: fingerprint(given) for name, given in task["sources"].items()}
    if "data" in task:
        identity["data"] = leaf_identity(task["data"])
    if "lm_eval" in task:
        identity["lm_eval"] = _lm_eval(task["lm_eval"])
    return identity


def leaf_identity(leaf: Mapping) -> dict:
    """What a config leaf makes: a function by its name and source, and its values with its defaults."""
    module, _, function = leaf["_target_"].rpartition(".")
    return {"function": function, "source": source.code(module), "values": by_content(completed(leaf))}


def expert_id(suite: Mapping, name: str) -> str:
    """What the cached expert of a task depends on: base and tokenizer, training and validation rows, and recipe."""
    task = suite["tasks"][name]
    trained_on = task_identity(task) | {"metrics": None, "rows": dict(task["rows"]) | {"test": None}}
    if "lm_eval" in task:
        trained_on["lm_eval"] = _lm_eval(task["lm_eval"], without=SCORING)
    return hashed([fingerprint(suite["base"]), _tokenizer(suite), trained_on, _recipes(suite)[name]])


def expert_folder(suite: Mapping, name: str) -> Path:
    """Where the cache keeps the expert that is fine-tuned for a task of the suite."""
    return cache_dir() / "experts" / f"{name}-{expert_id(suite, name)}"


def origins(suite: Mapping) -> dict[str, str]:
    """Per task where its expert comes from: the content of a checkpoint, or the recipe of a fine-tuning and its id."""
    if suite["checkpoints"] is not None:
        return {name: fingerprint(given) for name, given in suite["checkpoints"].items()}
    found = {}
    for name in own_experts(suite):
        how = json.dumps(recipe(suite, suite["tasks"][name]))
        found[name] = f"the base, fine-tuned by twinbench as {how}: {expert_id(suite, name)}"
    return found


def by_content(value: object) -> object:
    """Values of a configuration, with the content of a file in place of its path."""
    if isinstance(value, Mapping):
        return {key: by_content(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [by_content(item) for item in value]
    if isinstance(value, str) and re.search(r"[/.\\]", value) and os.path.isfile(os.path.expanduser(value)):
        return {"file": fingerprint({"path": value})}
    return value


def hashed(identity: object) -> str:
    """Hash of nested values: the order of keys does not count, and 1 is 1.0."""
    return hashlib.sha256(json.dumps(_canonical(identity), sort_keys=True).encode()).hexdigest()[:12]


def _canonical(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tokenizer(suite: Mapping) -> str | None:
    return fingerprint(suite["tokenizer"]) if suite.get("tokenizer") else None


def _check_commits(suite: Mapping) -> None:
    """Find the hub sources of a suite's models whose commit is not given, and how to give it on the command line."""
    sources = {"suite.base.revision": suite["base"], "suite.tokenizer.revision": suite.get("tokenizer") or {}}
    for name, given in (suite["checkpoints"] or {}).items():
        sources["suite.revision" if "revision" in suite else f"suite.checkpoints.{name}.revision"] = given
    hubs = {key: unpinned(given) for key, given in sources.items() if given.get("hub")}
    wanted = [f"{key}=COMMIT of {repository}" for key, repository in hubs.items() if repository]
    if wanted:
        raise Mistake(
            f"suite {suite['name']} is read at commits (40 hex digits, for branches and tags move), so give "
            f"{', '.join(wanted)}: `git ls-remote {HUB}/OWNER/REPO HEAD` prints one"
        )


def _recipes(suite: Mapping) -> dict[str, dict]:
    """Per task with an expert how that is fine-tuned, with the defaults of what the suite leaves out."""
    target = f"twinbench.workloads.{'generation' if generative(suite) else 'classification'}.finetune.Recipe"
    defaults = dict(signature(target).defaults)
    return {name: defaults | recipe(suite, suite["tasks"][name]) for name in own_experts(suite)}


def _lm_eval(name: str, without: tuple[str, ...] = ()) -> object:
    """What an lm-eval task is: of one of ours, or of a YAML file, its content; of those that lm-eval has, the name.

    Args:
        without: keys that do not count.
    """
    file = LM_EVAL / f"{name.removeprefix(PREFIX)}.yaml" if name.startswith(PREFIX) else Path(name)
    if not name.startswith(PREFIX) and file.suffix != ".yaml":
        return name
    if not file.exists():
        raise FileNotFoundError(f"lm_eval: there is no file {file}")
    return by_content({key: value for key, value in _written(file).items() if key not in without})


def _written(file: Path, inside: tuple[Path, ...] = ()) -> dict:
    """An lm-eval YAML file and what it includes, as lm-eval reads them, with the source of every ``!function``.

    Raises:
        ValueError: it includes itself.
        FileNotFoundError: there is no such file.
    """
    if file.resolve() in inside:
        raise Mistake(f"{file}: it includes itself")

    class Loader(yaml.SafeLoader):
        """Knows ``!function``."""

    Loader.add_constructor("!function", lambda loader, node: _function(loader.construct_scalar(node), file.parent))
    try:
        own = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as error:
        raise Mistake(f"{file}: not YAML ({error})") from error
    if not isinstance(own, dict):
        raise Mistake(f"{file}: an lm-eval task is a mapping, got {type(own).__name__}")
    included = own.pop("include", [])
    found = {}
    for other in included if isinstance(included, list) else [included]:
        found |= _written(file.parent / other, (*inside, file.resolve()))
    return found | own


def _function(name: str, folder: Path) -> list[str]:
    """A function's name and the source of its module: a file beside the YAML file, or else a module."""
    module, _, function = name.rpartition(".")
    file = folder / f"{module.replace('.', '/')}.py"
    return [function, source.digest(file) if file.exists() else source.code(module)]
