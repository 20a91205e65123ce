"""LiNeS: "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", Wang et al., ICLR 2025,
arXiv 2410.17146.

It modifies the result of a static method (``method@shared``): deeper blocks get more of the merged task vector. With
tau_m = merged - base, a tensor of block l in 0 .. L - 1 becomes ``base + (a + b l / (L - 1)) tau_m``, and one outside
of the blocks ``base + a tau_m``. ``a = (||sum_t tau_t||_1 / ||tau_m||_1) / T`` over all tensors, so that the lowest
block gets the average's share of Task Arithmetic. The paper's beta is ``slope``.

b is in the unit of the merged task vector: the paper's values are for Task Arithmetic with ``shared.scaling=1``.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from twinbench.merging.blocks import block, count
from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import by_pieces


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    shared: Mapping[str, Tensor],
    intercept: float | None,
    slope: float,
) -> Merged:
    """Scale the merged task vector by depth.

    Args:
        shared: what a static method made of the experts.
        intercept: a; None: the formula's.
        slope: b.

    Raises:
        ValueError: a hyperparameter is not finite.
    """
    for name, value in (("intercept", intercept), ("slope", slope)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    first = _intercept(base, experts, shared) if intercept is None else intercept
    last = count(base) - 1

    def scaled(name: str):
        depth = block(name)
        factor = first + (slope * depth / last if depth and last else 0.0)
        return lambda origin, pieces: origin + factor * (pieces[0] - origin)

    return Merged(by_pieces(base, {"shared": shared}, scaled))


def _intercept(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], shared: Mapping[str, Tensor]
) -> float:
    """(||sum of the task vectors||_1 / ||merged task vector||_1) / number of tasks; 0 where nothing was merged."""
    whole = moved = 0.0
    for name in base:
        origin = base[name]
        if origin.is_floating_point():
            whole += sum(own[name].float() - origin.float() for own in experts.values()).abs().double().sum().item()
            moved += (shared[name].float() - origin.float()).abs().double().sum().item()
    return whole / moved / len(experts) if moved else 0.0
