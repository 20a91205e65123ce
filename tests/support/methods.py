"""Method files called as a run calls them, on a base and experts of a few random tensors."""

import importlib
from pathlib import Path

import torch
from omegaconf import OmegaConf

from support.commands import ROOT
from twinbench.merging.compress import basis
from twinbench.plan.signature import hyperparameters, signature

YAMLS = sorted((ROOT / "conf" / "method").glob("*.yaml"))
SHAPES = {"embed.weight": (30, 8), "up.weight": (12, 8), "up.bias": (12,), "down.weight": (8, 12), "norm.weight": (8,)}


def models(seed: int = 0, count: int = 3, dtype=torch.float32) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale):
        return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    base = draw(1.0)
    experts = {f"task{t}": {n: base[n] + d for n, d in draw(0.1).items()} for t in range(count)}
    cast = lambda state: {name: tensor.to(dtype) for name, tensor in state.items()}  # noqa: E731
    return cast(base), {task: cast(state) for task, state in experts.items()}


def call(path: Path, base, experts, **changes):
    """Call a method with its YAML's values and what a run prepares."""
    leaf = OmegaConf.load(path)
    takes = signature(leaf["_target_"])
    values = hyperparameters(OmegaConf.to_container(leaf))
    values |= {"task": "task1"} if path.stem == "expert" else {}
    prepared = {"shared": base, "seed": 0, "basis": basis}
    values |= {name: prepared[name] for name in takes.arguments & prepared.keys()}
    module, _, function = leaf["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), function)(base, experts, **values | changes)
