"""TALL-masks: "Localizing Task Information for Improved Model Merging and Compression", Wang et al., ICML 2024,
arXiv 2405.07813.

With ``tau_t = expert_t - base`` and ``tau = sum_t tau_t``: the mask ``m_t = 1{|tau_t| > lambda |tau - tau_t|}`` keeps
what is a task's own, and ``expert_t ~ base + m_t tau``. Here ``shared = base``, the common tensors are tau,
``exclusive_t = m_t tau``, and w is one-hot at the known task. The paper's lambda is ``threshold``.

Departure: the authors choose lambda for each task by its score on validation data, of 0.2 to 0.6. A method sees no
scores, so one threshold serves all tasks; a sweep over ``method.threshold`` with ``split=validation`` chooses it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.parts import Masked, packed
from twinbench.weights.state_dict import StateDict, keeping_last

ROUTE = "task"


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, threshold: float) -> Merged:
    """Keep the sum of the task vectors, and per expert a mask of it.

    Args:
        threshold: a task's own weight is kept if it exceeds this share of the other tasks' sum; at least 0. A larger
            one keeps less.

    Raises:
        ValueError: threshold is negative.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    names = [name for name in base if base[name].is_floating_point()]

    def summed(name: str) -> Tensor:
        origin = base[name].float()
        return sum((expert[name].float() - origin for expert in experts.values()), torch.zeros_like(origin))

    common = keeping_last(StateDict(names, summed))

    def part(task: str, name: str) -> Masked:
        own = experts[task][name].float() - base[name].float()
        others = common[name] - own if len(experts) > 1 else torch.zeros_like(own)  # exactly, not up to rounding
        return Masked(packed(own.abs() > threshold * others.abs()), torch.tensor(1.0), common[name])

    exclusive = {task: StateDict(names, lambda name, task=task: part(task, name)) for task in experts}
    return Merged(base, exclusive, common=common)
