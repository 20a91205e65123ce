"""Method files called as a run calls them, on a base and experts of a few random tensors."""

import importlib
from functools import cache
from pathlib import Path

import torch
from omegaconf import OmegaConf

from support.commands import ROOT
from twinbench.merging.compress import basis, generator
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


@cache
def leaf(path: Path) -> dict:
    """What a method's YAML holds."""
    return OmegaConf.to_container(OmegaConf.load(path))


def call(path: Path, base, experts, **changes):
    """Call a method with its YAML's values and what a run prepares."""
    target = leaf(path)["_target_"]
    takes = signature(target)
    values = hyperparameters(leaf(path))
    values |= {"task": "task1"} if path.stem == "expert" else {}
    prepared = {"shared": base, "seed": 0, "basis": basis}
    prepared["fisher"] = lambda expert, rows: information(base, f"{expert} {rows}")
    prepared["gram"] = lambda expert, rows: grams(base, f"{expert} {rows}")
    prepared["means"] = lambda expert, rows: means(base, f"{expert} {rows}")
    prepared["prefix_gram"] = lambda state, expert, rows, names: {
        n: g for n, g in grams(base, f"{expert} {rows}").items() if n in names
    }
    prepared["joint"] = lambda *numbers: _drawn(base, generator(0, str(numbers)))
    prepared["entropy"] = prepared["scored_entropy"] = lambda state, task, rows, size, draw: _drawn(
        state, generator(draw.initial_seed() % 1000, task, str((rows, size)))
    )
    values |= {name: prepared[name] for name in takes.arguments & prepared.keys()}
    module, _, function = target.rpartition(".")
    return getattr(importlib.import_module(module), function)(base, experts, **values | changes)


def _drawn(state, draw) -> dict:
    """Random numbers in the shapes of the tensors."""
    return {name: tensor + torch.randn(tensor.shape, generator=draw).to(tensor.dtype) for name, tensor in state.items()}


def information(base, key: str) -> dict:
    """Positive numbers in the shapes of the tensors, the same for the same key."""
    return {name: torch.rand(tensor.shape, generator=generator(0, key, name)) for name, tensor in base.items()}


def grams(base, key: str, tokens: int = 20) -> dict:
    """Per linear layer of `models` the mean outer product of random inputs, the same for the same key."""
    linear = {name: tensor.shape[1] for name, tensor in base.items() if name.endswith(("up.weight", "down.weight"))}
    inputs = {name: torch.randn(tokens, width, generator=generator(0, key, name)) for name, width in linear.items()}
    return {name: found.T @ found / tokens for name, found in inputs.items()}


def means(base, key: str) -> dict:
    """Per linear layer of `models` a mean input, the same for the same key."""
    return {name: gram[0] for name, gram in grams(base, key).items()}


def assert_same(left, right, tolerance=0.0):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=tolerance, rtol=0)
