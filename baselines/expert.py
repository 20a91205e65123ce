"""One task's expert for every task: a row of the expert x task matrix.

As the shared expert of Twin-Merging it is that paper's ablation "task-specific expert as shared".

``shared = expert_task``; there are no exclusive parts.
"""

from collections.abc import Mapping

from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.system.mistakes import one_of
from twinbench.weights.state_dict import StateDict

ROLE = "one expert"  # of a report's rows


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, task: str) -> Merged:
    """Return the expert of ``task``.

    Raises:
        ValueError: no expert has that name.
    """
    one_of("task", task, experts)
    expert = experts[task]  # a LoRA expert is float32 beside a base of fewer digits
    return Merged(StateDict(base, lambda name: expert[name].to(base[name].dtype)))
