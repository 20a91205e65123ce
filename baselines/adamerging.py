"""AdaMerging and AdaMerging++: "AdaMerging: Adaptive Model Merging for Multi-Task Learning", Yang et al., ICLR 2024,
arXiv 2310.02575.

``shared = base + sum_t lambda_t tau_t`` with a coefficient per task (``granularity: task``) or per task and tensor
(``layer``), found by ``steps`` steps of Adam down the sum over tasks of the mean entropy of the merged model's
predictions on unlabelled inputs; coefficients stay in [0, 1]. By the chain rule ``d/d lambda_t = <d/d shared, tau_t>``,
so a step needs the gradient of one model and no graph through the merge. AdaMerging++ is ``density: 0.2``: task vectors
are trimmed and lose what has not the elected sign, as in TIES (`baselines.ties`); 1 keeps them whole.

A regression has no entropy: a suite that has one is refused. All task vectors are in memory at once.

Departure: the authors adapt on the test's inputs and look at its accuracy meanwhile. Here the rows are held out of the
training data; `baselines.adamerging_tta` reads the test's inputs.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from baselines.ties import kept_above
from twinbench.merging.compress import generator
from twinbench.merging.merged import Merged


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    granularity: str,
    density: float,
    start: float,
    steps: int,
    lr: float,
    rows: int,
    size: int,
    seed: int,
    entropy: Callable[[Mapping[str, Tensor], str, int, int, torch.Generator], Mapping[str, Tensor]],
) -> Merged:
    """Find the coefficients under which the merged model is surest, and merge.

    Args:
        granularity: "layer" or "task": a coefficient per task and tensor, or per task.
        density: share of each task vector that is kept, in (0, 1]; 1 keeps it whole.
        start: of all coefficients, in [0, 1].
        steps, lr: of Adam; no step is Task Arithmetic.
        rows: inputs of each task to draw from.
        size: inputs of each task drawn for a step, in [1, rows].
        entropy: the gradient of the mean entropy of drawn inputs of a task by each merged tensor.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if granularity not in ("layer", "task"):
        raise ValueError(f"granularity must be layer or task, got {granularity!r}")
    for name, value, low in (("density", density, False), ("start", start, True)):
        if not (0 <= value <= 1 and (low or value)):
            raise ValueError(f"{name} must be in {'[' if low else '('}0, 1], got {value}")
    if steps < 0 or not lr > 0:
        raise ValueError(f"steps must be at least 0 and lr above 0, got {steps} and {lr}")
    if not 1 <= size <= rows:
        raise ValueError(f"size must be in [1, rows={rows}], got {size}")
    names = [name for name in base if base[name].is_floating_point()]
    vectors = _vectors(base, experts, names, density)
    with torch.inference_mode(False):
        found = torch.full((len(experts), len(names) if granularity == "layer" else 1), start)
        optimizer = torch.optim.Adam([found], lr=lr)
        for step in tqdm(range(steps if names else 0), desc="AdaMerging", unit="step", leave=False):
            state = _merged(base, vectors, names, found)
            found.grad = torch.zeros_like(found)
            for task in experts:
                slopes = entropy(state, task, rows, size, generator(seed, task, str(step)))
                each = [[float((slopes[name] * own[name]).sum()) for name in names] for own in vectors.values()]
                slope = torch.tensor(each)
                found.grad += slope if granularity == "layer" else slope.sum(1, keepdim=True)
            optimizer.step()
            found.clamp_(0, 1)
    return Merged(dict(base.items()) | _merged(base, vectors, names, found))


def _vectors(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], names: list[str], density: float
) -> dict[str, dict[str, Tensor]]:
    """Task vectors in float32, trimmed and with the elected sign alone where ``density`` is below 1."""
    found = {t: {name: own[name].float() - base[name].float() for name in names} for t, own in experts.items()}
    if density == 1:
        return found
    for own in found.values():
        limit = kept_above(own, density)
        for name in names:
            own[name] *= own[name].abs() >= limit
    for name in names:
        elected = sum(own[name] for own in found.values()).sign()
        for own in found.values():
            own[name] *= own[name].sign() == elected
    return found


def _merged(
    base: Mapping[str, Tensor], vectors: Mapping[str, Mapping[str, Tensor]], names: list[str], found: Tensor
) -> dict[str, Tensor]:
    """The merged tensors of coefficients (tasks, tensors) or (tasks, 1)."""
    merged = {}
    for place, name in enumerate(names):
        total = base[name].float().clone()
        for own, coefficients in zip(vectors.values(), found.detach().tolist(), strict=True):
            total.add_(own[name], alpha=coefficients[place if len(coefficients) > 1 else 0])
        merged[name] = total.to(base[name].dtype)
    return merged
