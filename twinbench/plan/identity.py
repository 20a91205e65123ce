"""Identities: hashes of what changes a number, and of nothing else.

No path is in them, of a module as little as of a file: code counts by its source, files by their content.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from twinbench.assets.sources import HUB, by_content, cache_dir, fingerprint, unpinned
from twinbench.plan.signature import completed, signature
from twinbench.plan.suite import merged, own_experts, recipe, scaled, scored, workload
from twinbench.system import source
from twinbench.system.mistakes import Mistake


def suite_identity(suite: Mapping) -> dict:
    """Everything about a suite that changes scores: contents of its sources, tasks, and how experts come about.

    Raises:
        ValueError: experts come from nowhere, from two places, or not for every task; a revision that is no commit.
    """
    who, checkpoints = f"suite {suite['name']}", suite["checkpoints"]
    if (suite["finetune"] is None) == (checkpoints is None):
        raise Mistake(f"{who}: set one of finetune and checkpoints, and the other to null")
    own = own_experts(suite)
    if checkpoints is not None and set(checkpoints) != set(own):
        raise Mistake(f"{who}: checkpoints are of {', '.join(checkpoints)}, tasks {', '.join(own)}")
    _check_commits(suite)
    experts = _recipes(suite) if checkpoints is None else {name: fingerprint(checkpoints[name]) for name in own}
    found = {
        "base": fingerprint(suite["base"]),
        "tokenizer": _tokenizer(suite),
        "experts": experts,
        "tasks": {name: task_identity(suite, task) for name, task in suite["tasks"].items()},
        "order": list(suite["tasks"]),  # a router has its outputs in it
        "merged": merged(suite),
        "limit": suite["limit"],
    }
    # An id holds these two only where they are set: older ids have neither.
    found |= {"scaled": factors} if (factors := scaled(suite)) else {}
    found |= {"scored": some} if (some := scored(suite)) != list(suite["tasks"]) else {}
    # These keys stand in every id, as they did when there was one kind of model.
    return found | dict.fromkeys(("head", "dtype", "factored")) | workload(suite).identity(suite)


def task_identity(suite: Mapping, task: Mapping, *, training: bool = False) -> dict:
    """A task's settings, with the content of its sources, of its loader and of files that it names.

    Args:
        training: only what trains an expert counts.
    """
    identity = {key: value for key, value in task.items() if key not in ("sources", "data", "finetune")}
    identity = {key: value for key, value in identity.items() if value is not None}
    identity["sources"] = {name: fingerprint(given) for name, given in task["sources"].items()}
    if "data" in task:
        leaf = task["data"]
        idle = signature(leaf["_target_"]).scored if training else ()
        found = leaf_identity(leaf)
        values = {key: value for key, value in found["values"].items() if key not in idle}
        identity["data"] = found | {"values": values}
    return identity | workload(suite).task_identity(task, training=training)


def leaf_identity(leaf: Mapping) -> dict:
    """What a config leaf makes: a function by its name and source, and its values with its defaults."""
    module, _, function = leaf["_target_"].rpartition(".")
    return {"function": function, "source": source.code(module), "values": by_content(completed(leaf))}


def expert_id(suite: Mapping, name: str) -> str:
    """What the cached expert of a task depends on: base and tokenizer, training and validation rows, and recipe."""
    task = suite["tasks"][name]
    trained_on = task_identity(suite, task, training=True)
    trained_on |= {"metrics": None, "rows": dict(task["rows"]) | {"test": None}}
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
    defaults = dict(signature(workload(suite).RECIPE).defaults)
    found = {name: defaults | recipe(suite, suite["tasks"][name]) for name in own_experts(suite)}
    # Ids are older than label smoothing: without it they are what they were.
    return {name: {k: v for k, v in how.items() if k != "label_smoothing" or v} for name, how in found.items()}
