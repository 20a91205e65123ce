"""Identities: hashes of what changes a number, and of nothing else."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from twinbench import assets
from twinbench.suite_config import HEADS, generative, head, merged, own_experts, recipe

LM_EVAL = Path(__file__).parent / "tasks" / "lm_eval"


def suite_identity(suite: Mapping) -> dict:
    """Everything about a suite that changes scores: contents of its sources, tasks, and how experts come about.

    Raises:
        ValueError: experts come from nowhere, from two places, or not for every task; a tokenizer for classifiers.
    """
    who, checkpoints = f"suite {suite['name']}", suite["checkpoints"]
    if (suite["finetune"] is None) == (checkpoints is None):
        raise ValueError(f"{who}: set one of finetune and checkpoints, and the other to null")
    own = own_experts(suite)
    if checkpoints is not None and set(checkpoints) != set(own):
        raise ValueError(f"{who}: checkpoints are of {', '.join(checkpoints)}, tasks {', '.join(own)}")
    experts = suite["finetune"] or {t: assets.fingerprint(s) for t, s in checkpoints.items()}
    tasks = {name: task_identity(task) for name, task in suite["tasks"].items()}
    narrower = {} if suite.get("limit") is None else {"limit": suite["limit"]}
    if merged(suite) != own:
        narrower["merged"] = merged(suite)
    if head(suite) != HEADS[0]:
        narrower["head"] = head(suite)
    if suite.get("dtype", "float32") != "float32":
        narrower["dtype"] = suite["dtype"]
    if suite.get("tokenizer"):
        if not generative(suite):
            raise ValueError(f"{who}: tokenizer is for generative suites; classifiers have their base's")
        narrower["tokenizer"] = assets.fingerprint(suite["tokenizer"])
    return {"base": assets.fingerprint(suite["base"]), "experts": experts, "tasks": tasks} | narrower


def task_identity(task: Mapping) -> dict:
    """A task's settings, with the content of its sources in place of where they lie, and of its lm-eval files."""
    identity = dict(task) | {"sources": {name: assets.fingerprint(source) for name, source in task["sources"].items()}}
    if "lm_eval" in task:
        identity["lm_eval"] = _lm_eval(task["lm_eval"], "documents.py", "scoring.py")
    return identity


def expert_id(suite: Mapping, name: str) -> str:
    """What the cached expert of a task depends on: base and tokenizer, training and validation rows, and recipe."""
    base, task = suite["base"], suite["tasks"][name]
    trained_on = task_identity(task) | {"metrics": None, "rows": dict(task["rows"]) | {"test": None}}
    if "lm_eval" in task:
        trained_on["lm_eval"] = _lm_eval(task["lm_eval"], "documents.py")  # an answer's score does not train
    tokenizer = [assets.fingerprint(suite["tokenizer"])] if suite.get("tokenizer") else []
    return hashed([assets.fingerprint(base), trained_on, recipe(suite, task), *tokenizer])


def expert_folder(suite: Mapping, name: str) -> Path:
    """Where the cache keeps the expert that is fine-tuned for a task of the suite."""
    return assets.cache_dir() / "experts" / f"{name}-{expert_id(suite, name)}"


def origins(suite: Mapping) -> dict[str, str]:
    """Per task where its expert comes from: the content of a checkpoint, or the recipe of a fine-tuning and its id."""
    if suite["checkpoints"] is not None:
        return {name: assets.fingerprint(source) for name, source in suite["checkpoints"].items()}
    found = {}
    for name in own_experts(suite):
        how = json.dumps(recipe(suite, suite["tasks"][name]))
        found[name] = f"the base, fine-tuned by twinbench as {how}: {expert_id(suite, name)}"
    return found


def _lm_eval(name: str, *beside: str) -> str:
    """What identifies an lm-eval task: the content of its file, and of those beside it if it is ours; or its name."""
    file = LM_EVAL / f"{name.removeprefix('twinbench_')}.yaml"
    if file.exists():
        return hashed([path.read_text(encoding="utf-8") for path in (file, *(LM_EVAL / other for other in beside))])
    if name.endswith(".yaml") and not Path(name).exists():
        raise FileNotFoundError(f"lm_eval: there is no file {name}")
    return hashed(Path(name).read_text(encoding="utf-8")) if name.endswith(".yaml") else name


def hashed(identity) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
