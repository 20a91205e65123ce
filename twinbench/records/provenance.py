"""Where a number comes from: the code's commit and its versions, the data, and how the experts were trained."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from twinbench.assets.sources import origin
from twinbench.plan.identity import expert_folder
from twinbench.plan.job import Job
from twinbench.plan.suite import own_experts, workload
from twinbench.records.record import is_of
from twinbench.system import cached
from twinbench.system.mistakes import Mistake

PACKAGES = ("torch", "transformers", "numpy", "safetensors")


@lru_cache(maxsize=1)
def commit() -> tuple[str | None, bool | None]:
    """The commit of this source tree and whether it has uncommitted changes, or (None, None) outside a git checkout.

    Results are no source: writing records into the tree does not make it dirty.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None, None
    head = _git(root, "rev-parse", "HEAD")
    return head or None, bool(_git(root, "status", "--porcelain", "--", ".", ":!results")) if head else None


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def attempt(job: Job) -> dict:
    """What was run, with what, and when: what a record's `Attempt` says before the run is over."""
    head, dirty = commit()
    now = {"time": datetime.now(UTC).isoformat(), "commit": head, "dirty": dirty, "versions": versions()}
    return (
        job.identity() | {"route": job.route, "role": job.role, "reads": job.reads, "experiment": job.experiment} | now
    )


def origins(suite: Mapping) -> dict[str, dict]:
    """Per task of a resolved suite the ``data`` and ``expert`` of its records; the experts are in the cache."""
    own = experts(suite)
    return {task: {"data": said, "expert": own.get(task)} for task, said in data(suite).items()}


def data(suite: Mapping) -> dict[str, str]:
    """Per task of a resolved suite where its rows come from, e.g. ``nyu-mll/glue@bcdcba79/qqp``."""
    return {
        name: "; ".join(origin(source) for source in task["sources"].values()) for name, task in suite["tasks"].items()
    }


def experts(suite: Mapping) -> dict[str, str]:
    """Per task of a resolved suite with an expert of its own, which weights these are; they are in the cache.

    A recipe trains other weights on another machine, so what is fine-tuned here is told by the hash of its weights.

    Raises:
        ValueError: one has gone from the cache since it was trained.
    """
    if suite["checkpoints"] is not None:
        return {name: origin(source) for name, source in suite["checkpoints"].items()}
    found = {name: cached.weights_hash(expert_folder(suite, name)) for name in own_experts(suite)}
    if lost := [name for name, digest in found.items() if digest is None]:
        raise Mistake(f"suite {suite['name']}: the experts {', '.join(lost)} are no longer in the cache; run it again")
    return {name: f"fine-tuned, xxh3 {digest}" for name, digest in found.items()}


def trained(suite: Mapping) -> bool:
    """Whether the suite's experts are fine-tuned by twinbench and all of them are in the cache."""
    if suite["checkpoints"] is not None:
        return False
    folders = [expert_folder(suite, name) for name in own_experts(suite)]
    return all((folder / "training.json").exists() and cached.weights_hash(folder) is not None for folder in folders)


def retrained(rows: Iterable[Mapping], suite: Mapping) -> bool:
    """Whether a suite's experts were trained anew since a run: the cache holds all of them, and other weights.

    Args:
        rows: the run's record.
    """
    own = experts(suite) if trained(suite) else {}
    return not all(is_of(row, own) for row in rows)


def training(suite: Mapping, tasks: Mapping) -> dict[str, dict]:
    """Per task with an expert how that was trained, for a suite whose cached experts were trained here.

    Args:
        tasks: the suite's, loaded.

    Returns:
        Per task what the expert's ``training.json`` says (recipe, curve, seconds, device, torch), with ``expert`` (its
        name in the cache), ``weights`` (their hash), ``data``, ``rows`` (of train and validation), ``loss`` and
        ``metric``, the primary one.
    """
    origins, found = data(suite), {}
    for name in own_experts(suite):
        task = tasks[name]
        folder = expert_folder(suite, name)
        found[name] = {
            "expert": folder.name,
            "weights": f"xxh3 {cached.weights_hash(folder)}",
            "data": origins[name],
            "rows": {split: len(task.splits[split]) for split in ("train", "validation")},
        }
        loss, metric = workload(suite).learned(task)
        found[name] |= {"loss": loss, "metric": metric}
        found[name] |= _history(folder / "training.json")
    return found


def _history(file: Path) -> dict:
    """What a training wrote down; the NaN of one that diverged is no JSON, and None here.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None))
    except (ValueError, TypeError) as error:
        raise Mistake(f"{file}: not a training written down by twinbench ({error})") from error


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return ""
    return done.stdout.strip()
