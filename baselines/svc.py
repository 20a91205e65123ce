"""SVC, singular value calibration: arXiv 2602.05536, 2026.

It modifies the result of a static method (``method@shared``), whose spectrum is too large in directions that tasks
share. With D = merged - base = U S V^T for a matrix, the merged response in direction r is ``a_r = u_r^T D``, a task's
``a_r^t = u_r^T tau_t``, and what the merged one holds of it ``s_r^t = <a_r, a_r^t> / ||a_r^t||^2``::

    gamma_r = T / sum_t max(floor, s_r^t),   shared = base + U diag(gamma) U^T D

The paper's alpha is ``floor``: 0.1 for Task Arithmetic and Iso-C, 0.2 for Iso-CTS, 1 for TSV-M and WUDI. Tensors that
are no matrices stay as they were merged.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.merging.spectral import triplets
from twinbench.weights.state_dict import StateDict


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    shared: Mapping[str, Tensor],
    floor: float,
) -> Merged:
    """Rescale each direction of each merged matrix by what the tasks have in it.

    Args:
        shared: what a static method made of the experts.
        floor: the least that a task counts for, above 0.

    Raises:
        ValueError: floor is not above 0.
    """
    if not 0 < floor < math.inf:
        raise ValueError(f"floor must be above 0, got {floor}")

    def calibrated(name: str) -> Tensor:
        origin, merged = base[name], shared[name]
        if merged.dim() != 2 or not merged.is_floating_point():
            return merged
        delta = merged.float() - origin.float()
        left = triplets(delta).left
        response, held = left.T @ delta, torch.zeros(left.shape[1])
        for expert in experts.values():
            own = left.T @ (expert[name].float() - origin.float())
            size = own.square().sum(1)
            share = torch.where(size > 0, (response * own).sum(1) / size, 0.0)
            held += share.clamp(min=floor)
        gamma = len(experts) / held
        # What lies in directions too small to be found stays as it was merged.
        return (merged.float() + left @ ((gamma - 1)[:, None] * response)).to(merged.dtype).contiguous()

    return Merged(StateDict(shared, calibrated))
