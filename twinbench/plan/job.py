"""What a composed configuration means, found without loading a weight or torch: what is to run, and its mistakes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from twinbench.assets.sources import by_content
from twinbench.plan.identity import hashed, leaf_identity, suite_identity
from twinbench.plan.signature import (
    Signature,
    checked_signature,
    completed,
    draws,
    hyperparameters,
    learns,
    most_read,
    router_reads,
    signature,
)
from twinbench.plan.suite import merged, workload
from twinbench.protocol import NORMALIZER, PROTOCOLS
from twinbench.system import source
from twinbench.system.mistakes import Mistake, one_of

SPLITS = ("test", "validation")
UNWRITTEN = {"task": "each task a model of its own", "layer": "each linear layer experts of its own"}  # by route
WRITTEN = "twinbench.routing.mlp.Mlp"  # the router model that others can build from ``router.json``
CONFIGURATION = (
    "suite_id",
    "method",
    "params",
    "router",
    "protocol",
    "seed",
    "split",
    "precision",
)  # what a person has chosen


@dataclass(frozen=True)
class Leaf:
    """A function of the configuration and its values: the same object is hashed, recorded and called.

    Attributes:
        name: of the chosen file.
        target: MODULE.FUNCTION.
        values: its hyperparameters.
        takes: its signature.
    """

    name: str
    target: str
    values: Mapping
    takes: Signature

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers under these values, so that its seed changes its result."""
        return draws(self.takes, self.values)

    @property
    def identity(self) -> dict:
        """What it does: its source and its values."""
        return leaf_identity({"_target_": self.target, **self.values})


@dataclass(frozen=True)
class Job:
    """One configuration: what identifies it, and what runs it.

    Attributes:
        run_id: hash of everything that changes the result, and of nothing else.
        source: the part of it that a person has not chosen: the code of the methods and the content of files they read.
        suite_id: the same for the suite alone (base, experts, tasks).
        params: the method's hyperparameters, with those of its shared expert's method under ``shared``.
        router, seed: None where the result does not depend on them.
        split: that is scored: test, or validation to choose hyperparameters by.
        precision: of forward passes.
        route: the route that protocol and router leave to the method: None, "task" (the known task), "router",
            "layer" (per layer), or "top1" (one-hot at the router's choice).
        role: of the method: "upper bound", "lower bound", "one expert" or None.
        reads: the data that the method and its router need, one of `signature.READS`.
        config: the resolved configuration; its suite has the chosen tasks.
        leaves: the method, and the shared expert's method if it asks for one.
        experiment: the chosen experiment file.
    """

    run_id: str
    source: str
    suite: str
    suite_id: str
    base: str
    method: str
    params: Mapping
    router: Mapping | None
    protocol: str
    seed: int | None
    split: str
    precision: str
    route: str | None
    role: str | None = field(compare=False)
    reads: str = field(compare=False)
    config: Mapping = field(compare=False, repr=False)
    leaves: Mapping[str, Leaf] = field(compare=False, repr=False)
    experiment: str | None = field(compare=False)

    def identity(self) -> dict:
        """The fields of its records that say what was run."""
        named = ("run_id", "source", "suite", "suite_id", "base", "method", "params", "router", "protocol", "seed")
        return {name: getattr(self, name) for name in (*named, "split", "precision")}

    @property
    def results_dir(self) -> Path:
        return Path(self.config["results_dir"])

    @property
    def label(self) -> str:
        """The configuration in one line, for a person."""
        shown = {key: value for key, value in self.params.items() if key != "shared"}
        for key, value in self.params.get("shared", {}).items():
            shown["method@shared" if key == "method" else f"shared.{key}"] = value
        values = "".join(f" {key}={value}" for key, value in shown.items() if value is not None)
        router = f" router={self.router['name']}" if self.router else ""
        seed = "" if self.seed is None else f" seed={self.seed}"
        split = "" if self.split == "test" else f" split={self.split}"
        precision = "" if self.precision == "float32" else f" precision={self.precision}"
        return f"{self.suite} {self.protocol:6} {self.method}{values}{router}{seed}{split}{precision}"


def configured(config: Mapping, names: Mapping[str, str | None]) -> Job:
    """Check a resolved configuration and say what it stands for.

    Args:
        names: the chosen file of each config group: ``method``, ``shared``, ``router``, ``experiment``.

    Raises:
        ValueError: unknown protocol, or hyperparameters that do not fit the method.
        FileNotFoundError: a local source is not there.
    """
    one_of("protocol", config["protocol"], PROTOCOLS)
    one_of("split", config["split"], SPLITS)
    leaves = _leaves(config, names)
    method, asked, blind = leaves["method"], config["router"], not PROTOCOLS[config["protocol"]].knows_task
    oracle = asked["model"] is None
    known = oracle and method.takes.route in ("router", "layer")
    route = "task" if known else method.takes.route
    _check_protocol(config, method.name, route == "task")
    needs = [leaf.takes.reads for leaf in leaves.values()]
    router, hashes = None, [leaf.identity | _form(config, leaf) for leaf in leaves.values()]
    drawn = any(leaf.draws for leaf in leaves.values())
    if method.takes.route == "router" or known or blind:
        settings = _router(config)
        router = {"name": "oracle" if oracle else names["router"], **settings}
        hashes.append(_router_identity(asked, settings))
        if not oracle:
            drawn |= _router_draws(asked)
            needs.append(router_reads(settings, learns=_learns(asked)))
    suite = suite_identity(config["suite"])
    shared = leaves.get("shared")
    found = {
        "suite_id": hashed(suite),
        "method": method.name,
        "params": dict(method.values) | ({"shared": {"method": shared.name, **shared.values}} if shared else {}),
        "protocol": config["protocol"],
        "seed": config["seed"] if drawn else None,
        "split": config["split"],
    }
    precision = config["precision"]
    counted = {} if precision == "float32" else {"precision": precision}  # ids of float32 are older than the setting
    if config["split"] == "validation" and config["suite"]["limit"]:
        counted |= {"held_out": config["suite"]["limit"]}  # in older ids it left out none of these rows
    # names are what the report calls and finds rows by
    run_id = hashed([found | {"params": None} | counted, shared.name if shared else None, hashes])
    return Job(
        run_id=run_id,
        source=hashed(hashes),
        suite=config["suite"]["name"],
        base=suite["base"],
        router=router,
        role=method.takes.role,
        reads=most_read(needs),
        route="top1" if blind and route == "task" else route,
        precision=precision,
        config=config,
        leaves=leaves,
        experiment=names.get("experiment"),
        **found,
    )


def changed_since(rows: Iterable[Mapping], job: Job) -> str | None:
    """When the newest result of a configuration was recorded whose source is another one; None if there is no such.

    Args:
        rows: records, oldest first.
    """
    own = {key: getattr(job, key) for key in CONFIGURATION}
    same = [row for row in rows if row["status"] == "ok" and {key: row.get(key) for key in CONFIGURATION} == own]
    others = [row["time"] for row in same if row.get("source") not in (None, job.source)]
    return others[-1] if others else None


def check_export(job: Job, folder: Path, suite: Mapping) -> None:
    """Find what keeps a configuration from being exported to ``folder``.

    Raises:
        ValueError: the folder has something in it, or the model is more than one shared model and LoRA adapters.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise Mistake(f"export={folder} must be a new or empty folder, and something is there")
    if job.leaves["method"].takes.role == "upper bound":
        raise Mistake(f"method={job.method} has nothing to export: its experts are models already")
    routed = job.leaves["method"].takes.route
    if routed in UNWRITTEN:
        raise Mistake(
            f"method={job.method} gives {UNWRITTEN[routed]}, and no command writes these to disk; what can be "
            "exported is a static method, such as ties, or method=twin_merging"
        )
    kind = suite["workload"]
    if routed and not workload(suite).EXPORTED:
        raise Mistake(
            f"method={job.method} of workload={kind} cannot be written to disk yet: export writes classifiers; a "
            "static method, such as ties, is merged by python -m twinbench.merge"
        )
    if not workload(suite).EXPORTED:
        words = f"python -m twinbench.merge method={job.method}"
        raise Mistake(f"export writes classifiers; {words} merges models of workload={kind} to disk")
    probed = [name for name, task in suite["tasks"].items() if task.get("probe")]
    if probed:
        raise Mistake(f"export writes each task's head, and {', '.join(probed)} has none: leave it out of suite.only")
    if PROTOCOLS[job.protocol].gold_biases:
        said = f"protocol={job.protocol} keeps every task's own biases, so there is no one model to export"
        raise Mistake(f"{said}; use {NORMALIZER}")
    reads, model = job.router or {}, job.config["router"]["model"]
    if reads and model and model["_target_"] != WRITTEN:
        kind = model["_target_"].rpartition(".")[2]
        raise Mistake(f"export writes routers of linear layers, such as router=mlp, got router.model {kind}")
    if reads.get("minimum_risk"):
        raise Mistake("export writes a router whose weights are its probabilities: router.use.minimum_risk=false")
    if reads.get("source", "shared") != "shared" or reads.get("characters"):
        legal = "router.features.source=shared router.features.characters=0"
        raise Mistake(f"export writes a router of the shared expert's hidden states: {legal}")
    compression = job.params.get("compression", "svd")
    if compression != "svd":
        raise Mistake(f"export writes LoRA adapters, which needs method.compression=svd, got {compression}")


def _leaves(config: Mapping, names: Mapping[str, str | None]) -> dict[str, Leaf]:
    """The method, and the method that makes its shared expert if it asks for one."""
    found = {"method": _leaf(config, names, "method")}
    if "shared" in found["method"].takes.arguments:
        found["shared"] = inner = _leaf(config, names, "shared")
        if inner.takes.route or "shared" in inner.takes.arguments:
            raise Mistake(f"method@shared={inner.name}: the shared expert needs a static method")
    return found


def _leaf(config: Mapping, names: Mapping[str, str | None], group: str) -> Leaf:
    takes = checked_signature(names[group], config[group])
    return Leaf(names[group], config[group]["_target_"], hyperparameters(config[group]), takes)


def _form(config: Mapping, leaf: Leaf) -> dict:
    """The source of what runs in place of ``merge`` where experts are LoRA factors."""
    module = leaf.target.rpartition(".")[0]
    return {"factored": source.function(f"{module}.factored")} if config["suite"].get("factored") else {}


def _router(config: Mapping) -> dict:
    """The settings of a router's three leaves, one after the other; none of an oracle, which has no model.

    Raises:
        ValueError: two leaves have a setting of the same name, or the run cannot be scored with such a router.
    """
    asked = config["router"]
    if asked["model"] is None:
        if not PROTOCOLS[config["protocol"]].knows_task:
            raise Mistake("protocol=blind knows no task, which is what router=oracle goes by; choose router=mlp")
        return {}
    model = completed(asked["model"])
    twice = sorted(model.keys() & (asked["features"].keys() | asked["use"].keys()))
    if twice:
        raise Mistake(f"router.model has {', '.join(twice)}, which is a setting of router.features or router.use")
    if asked["use"]["minimum_risk"]:
        _check_risk(config)
    if config["split"] == "validation" and asked["features"]["rows"] is None and _learns(asked):
        said = "split=validation scores the rows that this router is trained on"
        raise Mistake(f"{said}; train it on others: router.features.rows=1000")
    if config["split"] == "validation" and asked["use"]["minimum_risk"]:
        raise Mistake("split=validation scores the rows whose labels tell router.use.minimum_risk what a route costs")
    if asked["features"]["source"] == "entropies":
        _check_entropies(config)
    if asked["features"]["pool"] == "content" and workload(config["suite"]).LOADED:
        raise Mistake("router.features.pool=content reads what a prompt is about, and these tasks have no prompts")
    return {**asked["features"], **model, **asked["use"]}


def _router_identity(asked: Mapping, settings: Mapping) -> dict:
    """A router's class and its settings in one list, whichever leaf they stand in.

    The class of a model that is not ours may have the name of one that is, so its source counts.
    """
    module, _, kind = asked["model"]["_target_"].rpartition(".") if asked["model"] else ("twinbench", "", "Oracle")
    own = {} if module.partition(".")[0] == "twinbench" else {"source": source.code(module)}
    return {"class": kind, "values": by_content(settings)} | own


def _learns(asked: Mapping) -> bool:
    """Whether rows train a router."""
    return learns(asked["model"]["_target_"])


def _router_draws(asked: Mapping) -> bool:
    """Whether a router's seed changes its weights: by the fit of its model, or by the first centres of its groups."""
    model = asked["model"]
    return draws(signature(model["_target_"]), completed(model)) or asked["use"]["groups"] is not None


def _check_protocol(config: Mapping, method: str, known: bool) -> None:
    """Find what a protocol cannot be scored under.

    Args:
        known: whether the method goes by the known task.
    """
    unseen = [task for task in config["suite"]["tasks"] if task not in merged(config["suite"])]
    protocol = PROTOCOLS[config["protocol"]]
    if protocol.gold_biases and not workload(config["suite"]).HEADS:
        said = f"protocol={protocol.name} is about heads and biases, and these experts have no heads"
        raise Mistake(f"{said}; use {NORMALIZER}")
    if unseen and (known or protocol.needs_expert):
        what = f"method={method} goes by the known task" if known else f"protocol={config['protocol']}"
        raise Mistake(f"{what}, and no expert of {', '.join(unseen)} is merged: score unseen tasks under {NORMALIZER}")


def _check_entropies(config: Mapping) -> None:
    """Find what leaves the entropies of the experts' predictions undefined."""
    suite, what = config["suite"], "router.features.source=entropies runs every expert under the known task's head"
    if not workload(suite).HEADS:
        raise Mistake(f"{what}, and these experts have no heads; choose another router")
    if not PROTOCOLS[config["protocol"]].knows_task:
        raise Mistake(f"{what}, and protocol={config['protocol']} knows no task; use {NORMALIZER}")
    without = [name for name, task in suite["tasks"].items() if task.get("classes") is None or task.get("probe")]
    if without:
        raise Mistake(f"{what}, and {', '.join(without)} has no classes there: leave it out with suite.only")


def _check_risk(config: Mapping) -> None:
    """Find what leaves the costs of a router that minimizes risk undefined."""
    what = "router.use.minimum_risk goes by what each expert scores under the other tasks' heads"
    if not workload(config["suite"]).HEADS:
        raise Mistake(f"{what}, and these experts have no heads; use router=mlp")
    protocol = config["protocol"]
    if not PROTOCOLS[protocol].knows_task:
        raise Mistake(f"{what}, and under protocol={protocol} a row that goes to one is wrong; use router=text")
