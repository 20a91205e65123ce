"""What cannot be written to disk as one model with adapters and a router, found before anything is merged."""

from collections.abc import Mapping
from pathlib import Path

from twinbench.plan.job import Job
from twinbench.plan.suite import workload
from twinbench.protocol import NORMALIZER, PROTOCOLS
from twinbench.system.mistakes import Mistake

UNWRITTEN = {"task": "each task a model of its own", "layer": "each linear layer experts of its own"}  # by route
WRITTEN = "twinbench.routing.mlp.Mlp"  # the router model that others can build from ``router.json``


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
