"""What a composed configuration means, found without loading a weight or torch: what is to run, and its mistakes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from twinbench.assets.sources import by_content
from twinbench.plan.identity import hashed, leaf_identity, suite_identity
from twinbench.plan.refused import check_prepared, check_protocol, check_router
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
from twinbench.protocol import PROTOCOLS
from twinbench.system import source
from twinbench.system.mistakes import Mistake, one_of

SPLITS = ("test", "validation")
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
    check_protocol(config, method.name, known=route == "task")
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
    said = "method" if group == "method" else "method@shared"
    check_prepared(config["suite"], f"{said}={names[group]}", takes.arguments)
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
        check_router(config, learns=False)
        return {}
    model = completed(asked["model"])
    twice = sorted(model.keys() & (asked["features"].keys() | asked["use"].keys()))
    if twice:
        raise Mistake(f"router.model has {', '.join(twice)}, which is a setting of router.features or router.use")
    check_router(config, learns=_learns(asked))
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
