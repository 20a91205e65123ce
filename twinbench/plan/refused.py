"""What no run can score: protocol, router, precision and suite that do not fit each other, each with its reason."""

from collections.abc import Iterable, Mapping

from twinbench.plan.signature import NAMED, offered, prepared_by_class, prepared_needs
from twinbench.plan.suite import merged, scored, workload
from twinbench.protocol import NORMALIZER, PROTOCOLS
from twinbench.system.mistakes import Mistake


def check_protocol(config: Mapping, method: str, *, known: bool) -> None:
    """Refuse a protocol that the method cannot be scored under.

    Args:
        known: whether the method goes by the known task.

    Raises:
        ValueError: the experts have no heads, or a scored task has no expert.
    """
    own = merged(config["suite"])
    unseen = [task for task in scored(config["suite"]) if task not in own]
    protocol = PROTOCOLS[config["protocol"]]
    if protocol.gold_biases and not workload(config["suite"]).HEADS:
        said = f"protocol={protocol.name} is about heads and biases, and these experts have no heads"
        raise Mistake(f"{said}; use {NORMALIZER}")
    if unseen and (known or protocol.needs_expert):
        what = f"method={method} goes by the known task" if known else f"protocol={config['protocol']}"
        raise Mistake(f"{what}, and no expert of {', '.join(unseen)} is merged: score unseen tasks under {NORMALIZER}")


def check_precision(config: Mapping) -> None:
    """Refuse to compute a model in bfloat16 whose weights are in that already, or in float16.

    Raises:
        ValueError: the suite's ``dtype`` is not float32.
    """
    dtype, precision = config["suite"].get("dtype") or "float32", config["precision"]
    if precision != "float32" and dtype != "float32":
        raise Mistake(f"precision={precision}: the model computes in suite.dtype={dtype}; leave precision out")


def check_prepared(suite: Mapping, method: str, arguments: Iterable[str]) -> None:
    """Refuse a method that asks for what cannot be measured of the suite's models.

    Args:
        arguments: of the method.

    Raises:
        ValueError: the suite's workload lacks a function that measures it, its experts are LoRA factors, or a merged
            task has no classes where it goes by them.
    """
    for argument in sorted(NAMED.intersection(arguments)):
        needs = prepared_needs(argument)
        if needs and suite.get("factored"):
            raise Mistake(f"{method} needs {argument}, which runs experts as whole models: use suite.factored=false")
        if not set(needs) <= set(offered(suite["workload"])):
            said = f"{method} needs {argument}, which is not defined for the models of suite {suite['name']}"
            raise Mistake(f"{said}; choose another method")
        without = [task for task in merged(suite) if suite["tasks"][task].get("classes") is None]
        if prepared_by_class(argument) and without:
            said = f"{method} needs {argument}, and {', '.join(without)} has no classes"
            raise Mistake(f"{said}: leave it out with suite.only")


def check_router(config: Mapping, *, learns: bool) -> None:
    """Refuse a router that the run cannot be scored with.

    Args:
        learns: whether rows train the router.

    Raises:
        ValueError: it knows no task, learns from the scored rows, or lacks the heads, classes or prompts that it reads.
    """
    asked = config["router"]
    if asked["model"] is None:
        if not PROTOCOLS[config["protocol"]].knows_task:
            raise Mistake("protocol=blind knows no task, which is what router=oracle goes by; choose router=mlp")
        return
    if asked["use"]["minimum_risk"]:
        _check_risk(config)
    if config["split"] == "validation" and asked["features"]["rows"] is None and learns:
        said = "split=validation scores the rows that this router is trained on"
        raise Mistake(f"{said}; train it on others: router.features.rows=1000")
    if config["split"] == "validation" and asked["use"]["minimum_risk"]:
        raise Mistake("split=validation scores the rows whose labels tell router.use.minimum_risk what a route costs")
    if asked["features"]["source"] == "entropies":
        _check_entropies(config)
    if asked["features"]["pool"] == "content" and workload(config["suite"]).LOADED:
        raise Mistake("router.features.pool=content reads what a prompt is about, and these tasks have no prompts")


def _check_entropies(config: Mapping) -> None:
    """Find what leaves the entropies of the experts' predictions undefined."""
    suite, what = config["suite"], "router.features.source=entropies runs every expert under the known task's head"
    if not workload(suite).HEADS:
        raise Mistake(f"{what}, and these experts have no heads; choose another router")
    if not PROTOCOLS[config["protocol"]].knows_task:
        raise Mistake(f"{what}, and protocol={config['protocol']} knows no task; use {NORMALIZER}")
    asked = {name: suite["tasks"][name] for name in (*merged(suite), *scored(suite))}
    without = [name for name, task in asked.items() if task.get("classes") is None or task.get("probe")]
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
