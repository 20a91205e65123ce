"""Where a number comes from: the code's commit and the versions it ran with."""

import importlib.metadata
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path

PACKAGES = ("torch", "transformers", "numpy", "safetensors")


@lru_cache(maxsize=1)
def commit() -> tuple[str | None, bool | None]:
    """The commit of this source tree and whether it has uncommitted changes, or (None, None) outside a git checkout.

    Results are no source: writing records into the tree does not make it dirty.
    """
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None, None
    head = _git(root, "rev-parse", "HEAD")
    return head or None, bool(_git(root, "status", "--porcelain", "--", ".", ":!results")) if head else None


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


@lru_cache(maxsize=1)
def machine() -> str:
    """The processor's name and the number of cores that this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.processor() or platform.machine()}, {cores} cores"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return ""
    return done.stdout.strip()
