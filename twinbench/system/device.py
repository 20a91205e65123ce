"""Where models run, and what that machine is called."""

import os
import platform
from functools import lru_cache
from pathlib import Path

from twinbench.system import processes
from twinbench.system.mistakes import Mistake

PRECISIONS = ("float32", "bfloat16")
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # x86's and ARM's instructions for it


def picked(asked: str | None) -> str:
    """The device asked for, which must be there; by default a GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    import torch  # seconds that planning need not pay

    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and processes.count() > 1:
        asked = f"cuda:{processes.local_rank()}"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise Mistake(f"device={asked}: torch {torch.__version__} sees no CUDA device; use device=cpu or leave it out")
    return asked


def check_bfloat16(device: str, asked: str, instead: str) -> None:
    """Raise ValueError where the device would emulate bfloat16: slower than float32, and for nothing.

    Args:
        asked, instead: the setting that wants bfloat16, and the one to use there, as in ``precision=float32``.
    """
    if device.startswith("cuda"):
        import torch

        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = BFLOAT16 & _features() != set()
    if not native:
        raise Mistake(f"{asked}: {name(device)} computes in it by emulation; use {instead}")


def name(device: str) -> str:
    """The GPU's name, or the processor's; and how many processes each use one."""
    import torch

    own = torch.cuda.get_device_name(device) if device.startswith("cuda") else machine()
    return own if processes.count() == 1 else f"{processes.count()} processes, each on {own}"


@lru_cache(maxsize=1)
def _features() -> set[str]:
    """What the processor's instructions are called in Linux; elsewhere nothing is known of them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()}


@lru_cache(maxsize=1)
def machine() -> str:
    """The processor's name and the number of cores that this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.processor() or platform.machine()}, {cores} cores"
