"""Auto-Switch: T-Switch (`baselines.t_switch`) without the known task: a router weighs the binary parts.

"Less is More: Efficient Model Merging with Binary Task Switch", Qi et al., CVPR 2025, arXiv 2412.00054. Its router is
the share of each task among the nearest training rows in the unmerged base's features: ``router=knn``. The authors
average the router's weights over a batch, which holds one data set in their runs, and on RoBERTa take the largest one
alone; here each row has weights of its own.
"""

from collections.abc import Mapping

from torch import Tensor

from baselines import t_switch
from twinbench.merging.merged import Merged

ROUTE = "router"


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, density: float) -> Merged:
    """Keep the signs of each task's largest values, and their size, for a router to weigh.

    Args:
        density: share kept of the positive and of the negative values of each tensor, in (0, 1].

    Raises:
        ValueError: density is out of range.
    """
    return t_switch.merge(base, experts, density=density)
