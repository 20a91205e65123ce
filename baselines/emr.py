"""EMR-Merging: "Tuning-Free High-Performance Model Merging", Huang et al., NeurIPS 2024, arXiv 2405.17461.

With ``tau_t = expert_t - base``: *elect* one vector, ``tau = gamma * max{|tau_t| : sign(tau_t) = gamma}`` per weight,
where gamma is the sign of the mean task vector; *mask* it for each task, ``M_t = 1{tau_t * gamma > 0}``; *rescale* it,
``lambda_t = |tau_t| / |M_t * tau|``. So ``expert_t ~ base + lambda_t M_t tau``: here ``shared = base``, the common
tensors are tau, ``exclusive_t = lambda_t M_t tau``, and w is one-hot at the known task.

``|.|`` is the sum over tensors of a tensor's mean magnitude, as in the authors' code, where small tensors weigh as much
as large ones (``reduce: tensor_mean``), or the sum over all weights, as in the paper (``sum``). Heads stay the tasks'.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.parts import Masked, packed
from twinbench.weights.state_dict import StateDict, keeping_last

ROUTE = "task"
REDUCE = {"tensor_mean": Tensor.mean, "sum": Tensor.sum}


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, reduce: str) -> Merged:
    """Keep one elected task vector, and per expert a mask of it and a number.

    Args:
        reduce: "tensor_mean" or "sum".

    Raises:
        ValueError: reduce is neither.
    """
    if reduce not in REDUCE:
        raise ValueError(f"reduce must be one of {', '.join(REDUCE)}, got {reduce!r}")
    names = [name for name in base if base[name].is_floating_point()]
    elected = keeping_last(StateDict(names, lambda name: _elected(base[name], [e[name] for e in experts.values()])))
    scales = _scales(base, experts, elected, REDUCE[reduce])

    def part(task: str, name: str) -> Masked:
        own = elected[name]
        return Masked(packed(_agrees(experts[task][name], base[name], own)), torch.tensor(scales[task]), own)

    exclusive = {task: StateDict(names, lambda name, task=task: part(task, name)) for task in experts}
    return Merged(base, exclusive, common=elected)


def _elected(origin: Tensor, experts: list[Tensor]) -> Tensor:
    """Per weight the largest task vector in the direction of their mean, float32."""
    vectors = torch.stack([expert.float() - origin.float() for expert in experts])
    gamma = torch.where(vectors.mean(0) > 0, 1.0, -1.0)
    return gamma * (vectors * gamma).clamp(min=0).amax(0)


def _agrees(expert: Tensor, origin: Tensor, elected: Tensor) -> Tensor:
    """Where a task vector points in the elected direction; where nothing is elected nothing is masked in."""
    return (expert.float() - origin.float()) * elected > 0


def _scales(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    elected: Mapping[str, Tensor],
    reduce: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """lambda of each task, one number for all tensors; 0 for an expert that agrees with nothing."""
    whole, kept = (dict.fromkeys(experts, 0.0) for _ in range(2))
    for name in elected:
        for task, expert in experts.items():
            vector = expert[name].float() - base[name].float()
            whole[task] += reduce(vector.abs()).item()
            kept[task] += reduce(elected[name].abs() * _agrees(expert[name], base[name], elected[name])).item()
    return {task: whole[task] / kept[task] if kept[task] else 0.0 for task in experts}
