"""What a composed configuration means, found without loading a weight or torch: its identity and its mistakes."""

import ast
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from twinbench import assets
from twinbench.mistakes import one_of

PROTOCOLS = ("strict", "paper", "blind")
SPLITS = ("test", "validation")
LM_EVAL = Path(__file__).parent / "tasks" / "lm_eval"
PREPARED = {"base", "experts", "shared", "seed", "basis"}  # arguments that the run makes; the others are the YAML's


@dataclass(frozen=True)
class Job:
    """One configuration.

    Attributes:
        run_id: hash of everything that changes the result, and of nothing else.
        suite_id: the same for the suite alone (base, experts, tasks).
        params: the method's hyperparameters, with those of its shared expert's method under ``shared``.
        router, seed: None where the result does not depend on them.
        split: that is scored: test, or validation to choose hyperparameters by.
        route: how the method finds w(x): None, "task" or "router".
    """

    run_id: str
    suite: str
    suite_id: str
    base: str
    method: str
    params: Mapping
    router: Mapping | None
    protocol: str
    seed: int | None
    split: str
    route: str | None

    @property
    def label(self) -> str:
        """The configuration in one line, for a person."""
        shown = {key: value for key, value in self.params.items() if key != "shared"}
        shown |= {f"shared.{key}": value for key, value in self.params.get("shared", {}).items()}
        values = "".join(f" {key}={value}" for key, value in shown.items() if value is not None)
        router = f" router={self.router['name']}" if self.router else ""
        seed = "" if self.seed is None else f" seed={self.seed}"
        split = "" if self.split == "test" else f" split={self.split}"
        return f"{self.suite} {self.protocol:6} {self.method}{values}{router}{seed}{split}"


@dataclass(frozen=True)
class Signature:
    """Arguments and route of a method, read from its source."""

    arguments: frozenset[str]
    route: str | None


def job(config: Mapping, names: Mapping[str, str]) -> Job:
    """Check a resolved configuration and say what it stands for.

    Args:
        names: the chosen file of each config group: ``method``, ``shared``, ``router``.

    Raises:
        ValueError: unknown protocol, or hyperparameters that do not fit the method.
        FileNotFoundError: a local source is not there.
    """
    one_of("protocol", config["protocol"], PROTOCOLS)
    one_of("split", config["split"], SPLITS)
    signature = checked_signature(names["method"], config["method"])
    params = hyperparameters(config["method"])
    seeded = "seed" in signature.arguments
    if "shared" in signature.arguments:
        inner = checked_signature(names["shared"], config["shared"])
        if inner.route or "shared" in inner.arguments:
            raise ValueError(f"method@shared={names['shared']}: the shared expert needs a static method")
        params |= {"shared": {"method": names["shared"], **hyperparameters(config["shared"])}}
        seeded |= "seed" in inner.arguments
    router = None
    unseen = [task for task in config["suite"]["tasks"] if task not in merged(config["suite"])]
    known = signature.route == "task" or (signature.route == "router" and names["router"] == "oracle")
    if config["protocol"] == "paper" and generative(config["suite"]):
        raise ValueError("protocol=paper is about heads and biases that generative experts do not have; use strict")
    if unseen and (known or config["protocol"] != "strict"):
        what = f"method={names['method']} goes by the known task" if known else f"protocol={config['protocol']}"
        raise ValueError(f"{what}, and no expert of {', '.join(unseen)} is merged: score unseen tasks under strict")
    if signature.route == "router" or config["protocol"] == "blind":
        router = {"name": names["router"], **hyperparameters(config["router"])}
        if router.get("minimum_risk"):
            _check_risk(config)
        seeded |= names["router"] != "oracle"
    suite_id = _hash(suite_identity(config["suite"]))
    seed = config["seed"] if seeded else None
    identity = [suite_id, names["method"], params, router, config["protocol"], seed]
    run_id = _hash(identity + ([] if config["split"] == "test" else [config["split"]]))
    suite = config["suite"]["name"]
    base = suite_identity(config["suite"])["base"]
    chosen = (names["method"], params, router, config["protocol"], seed, config["split"])
    return Job(run_id, suite, suite_id, base, *chosen, signature.route)


def narrowed(suite: Mapping) -> dict:
    """The suite with the tasks that its ``only`` lists (and their order); null or no such key keeps all.

    Raises:
        ValueError: an unknown task, or none.
    """
    only = suite.get("only")
    if only is None:
        return dict(suite)
    if not only:
        raise ValueError("suite.only must list at least one task, or be null")
    for task in only:
        one_of("task in suite.only", task, suite["tasks"])
    kept = {key: suite[key] and {t: suite[key][t] for t in only if t in suite[key]} for key in ("tasks", "checkpoints")}
    return dict(suite) | kept


def merged(suite: Mapping) -> list[str]:
    """The tasks whose experts are merged: those that its ``merged`` lists, or all that have an expert of their own.

    Raises:
        ValueError: a task in it that the suite has no expert for, or none.
    """
    own = own_experts(suite)
    if suite.get("merged") is None:
        return own
    if not suite["merged"]:
        raise ValueError("suite.merged must list at least one task, or be null")
    for task in suite["merged"]:
        one_of("task in suite.merged", task, own)
    return [task for task in own if task in suite["merged"]]


def own_experts(suite: Mapping) -> list[str]:
    """The tasks with an expert of their own; the others name the task whose head scores them.

    Raises:
        ValueError: such a task names one that has no expert either.
    """
    own = [name for name, task in suite["tasks"].items() if task.get("head") is None]
    for name, task in suite["tasks"].items():
        if name not in own:
            one_of(f"head of task {name}", task["head"], own)
    return own


def generative(suite: Mapping) -> bool:
    """Whether the suite's tasks are lm-eval's, answered by a causal language model.

    Raises:
        ValueError: some are and some are not.
    """
    asked = {name for name, task in suite["tasks"].items() if "lm_eval" in task}
    if asked and asked != set(suite["tasks"]):
        others = ", ".join(name for name in suite["tasks"] if name not in asked)
        raise ValueError(f"suite {suite['name']}: {', '.join(sorted(asked))} are lm-eval's tasks, {others} are not")
    return bool(asked)


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
    return _hash([assets.fingerprint(base), trained_on, recipe(suite, task), *tokenizer])


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


def recipe(suite: Mapping, task: Mapping) -> dict:
    """How the expert of a task is fine-tuned: as the suite says, but for what the task's own ``finetune`` changes."""
    return suite["finetune"] | (task.get("finetune") or {})


def check_export(job: Job, folder: Path, suite: Mapping) -> None:
    """Find what keeps a configuration from being exported to ``folder``.

    Raises:
        ValueError: the folder has something in it, or the model is more than one shared model and LoRA adapters.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"export={folder} must be a new or empty folder, and something is there")
    if generative(suite):
        raise ValueError("export writes classifiers; merge a language model with python -m twinbench.merge instead")
    if job.protocol == "paper":
        raise ValueError("protocol=paper keeps every task's own biases, so there is no one model to export; use strict")
    if job.method == "individual":
        raise ValueError("method=individual has nothing to export: its experts are models already")
    reads = job.router or {}
    if reads.get("minimum_risk"):
        raise ValueError("export writes a router whose weights are its probabilities: minimum_risk=false")
    if reads.get("source", "shared") != "shared" or reads.get("characters"):
        raise ValueError("export writes a router of the shared expert's hidden states: source=shared, characters=0")
    compression = job.params.get("compression", "svd")
    if compression != "svd":
        raise ValueError(f"export writes LoRA adapters, which needs method.compression=svd, got {compression}")


def hyperparameters(leaf: Mapping) -> dict:
    """The values of a config leaf without Hydra's own keys."""
    return {key: value for key, value in leaf.items() if not key.startswith("_")}


def signature(target: str) -> Signature:
    """Read a method's keyword-only arguments and its module's ``ROUTE`` from the source; an import would load torch."""
    module, _, function = target.rpartition(".")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"_target_={target}: there is no module {module}")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    route, arguments = None, None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            arguments = frozenset(argument.arg for argument in node.args.kwonlyargs)
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["ROUTE"]:
            route = ast.literal_eval(node.value)
    if arguments is None:
        raise ValueError(f"_target_={target}: {spec.origin} has no function {function}")
    return Signature(arguments, route)


def checked_signature(name: str, leaf: Mapping) -> Signature:
    """The signature of a method's config leaf.

    Raises:
        ValueError: the leaf has a hyperparameter too many or too few.
    """
    found = signature(leaf["_target_"])
    given, wanted = set(hyperparameters(leaf)), found.arguments - PREPARED
    for key in sorted(given - wanted):
        one_of(f"hyperparameter of {name}", key, sorted(wanted))
    if wanted - given:
        raise ValueError(f"{name} lacks {', '.join(sorted(wanted - given))}; it takes {', '.join(sorted(wanted))}")
    return found


def _check_risk(config: Mapping) -> None:
    """Find what leaves the costs of a router that minimizes risk undefined."""
    what = "router.minimum_risk goes by what each expert scores under the other tasks' heads"
    if generative(config["suite"]):
        raise ValueError(f"{what}, and generative tasks have no heads; use router=mlp")
    if config["protocol"] == "blind":
        raise ValueError(f"{what}, and under protocol=blind a row that goes to one is wrong; use router=text")


def _lm_eval(name: str, *beside: str) -> str:
    """What identifies an lm-eval task: the content of its file, and of those beside it if it is ours; or its name."""
    file = LM_EVAL / f"{name.removeprefix('twinbench_')}.yaml"
    if file.exists():
        return _hash([path.read_text(encoding="utf-8") for path in (file, *(LM_EVAL / other for other in beside))])
    if name.endswith(".yaml") and not Path(name).exists():
        raise FileNotFoundError(f"lm_eval: there is no file {name}")
    return _hash(Path(name).read_text(encoding="utf-8")) if name.endswith(".yaml") else name


def _hash(identity) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
