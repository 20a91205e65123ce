"""DaWin: "Training-free Dynamic Weight Interpolation for Robust Adaptation", Oh et al., ICLR 2025, arXiv 2410.03782.

Task vectors are interpolated anew for each row, the surer experts counting more::

    W(x) = W_0 + lambda sum_t w_t(x) tau_t,    w(x) = softmax_t(-H_t(x))

with H_t the entropy of expert t's prediction (``router=dawin``). lambda is 0.3 times the number of experts in the
authors' code; at lambda = 1 a weight of 1 gives back the expert. Every expert is stored whole.

Departure from the authors' default, which averages the weights over a whole data set, and so knows which rows belong
together: each row has its own, as in their ablation by samples.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict

ROUTE = "router"


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, scaling: float) -> Merged:
    """Keep all task vectors, for a router to weigh.

    Args:
        scaling: lambda over the number of experts, finite.

    Raises:
        ValueError: scaling is not finite.
    """
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    names, factor = [name for name in base if base[name].is_floating_point()], scaling * len(experts)

    def part(task: str, name: str) -> Tensor:
        return factor * (experts[task][name].float() - base[name].float())

    return Merged(base, {task: StateDict(names, lambda name, task=task: part(task, name)) for task in experts})
