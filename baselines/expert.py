"""One task's expert for every task: a row of the expert x task matrix.

As the shared expert of Twin-Merging it is that paper's ablation "task-specific expert as shared".

``shared = expert_task``; there are no exclusive parts.
"""

import difflib
from collections.abc import Mapping

from torch import Tensor

from twinbench.merged import Merged
from twinbench.state_dict import StateDict


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, task: str) -> Merged:
    """Return the expert of ``task``.

    Raises:
        ValueError: no expert has that name.
    """
    if task not in experts:
        near = difflib.get_close_matches(task, experts, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown task {task!r}{hint} Known: {', '.join(experts)}.")
    expert = experts[task]  # a LoRA expert is float32 beside a base of fewer digits
    return Merged(StateDict(base, lambda name: expert[name].to(base[name].dtype)))
