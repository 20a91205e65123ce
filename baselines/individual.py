"""Every task by its own expert: the upper bound that scores are normalized by.

``shared = base``, ``exclusive_t = expert_t - base``, and w is one-hot at the known task.
"""

from collections.abc import Mapping

from torch import Tensor

from twinbench.merging.factored import Factors, whole
from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict

ROUTE = "task"
ROLE = "upper bound"  # of a report's rows


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> Merged:
    """Keep every task vector whole."""

    def task_vector(expert: Mapping[str, Tensor]) -> StateDict:
        return StateDict(base, lambda name: expert[name] - base[name])

    return Merged(base, {task: task_vector(expert) for task, expert in experts.items()})


def factored(base: Mapping[str, Tensor], adapters: Mapping[str, Factors]) -> Merged:
    """LoRA experts that stay factors: the adapters themselves."""
    return whole(base, adapters)
