"""KnOTS: "Model Merging with SVD to Tie the Knots", Stoica et al., ICLR 2025, arXiv 2410.19735.

LoRA experts change a matrix in directions of their own, so weight by weight their changes have little to do with each
other. Beside each other they have common left singular vectors, ``[tau_1 .. tau_T] = U S [V_1 .. V_T]^T``, and in their
coordinates, ``S V_t^T = U^T tau_t``, they can be compared. There TIES merges them (`baselines.ties`), over all matrices
at once if ``scope`` is global: ``shared = base + scaling * U TIES_t(U^T tau_t)``.

It is for matrices with a small rank; other tensors move by ``scaling`` times the mean task vector. Directions whose
singular value is rounding are left out, where the code leaves out those of at most 1e-5.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from baselines import ties
from twinbench.merging.merged import Merged
from twinbench.merging.spectral import matrixwise, triplets
from twinbench.weights.state_dict import StateDict, keeping_last


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    density: float,
    scaling: float,
    scope: str,
    aggregate: str,
) -> Merged:
    """Rotate the task vectors of each matrix into common directions, merge by TIES, and rotate back.

    Args:
        density: share of the coordinates that TIES keeps, in (0, 1].
        scope: "global" or "tensor".
        aggregate: "mean" or "sum".

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    names = [name for name in base if base[name].is_floating_point() and base[name].dim() == 2]
    lefts = keeping_last(StateDict(names, lambda name: _left(base[name], [own[name] for own in experts.values()])))
    turned = {
        task: StateDict(names, lambda name, own=own: lefts[name].T @ (own[name].float() - base[name].float()))
        for task, own in experts.items()
    }
    zero = StateDict(names, lambda name: torch.zeros(lefts[name].shape[1], base[name].shape[1]))
    merged = ties.merge(zero, turned, density=density, scaling=scaling, scope=scope, aggregate=aggregate).shared
    others = matrixwise(base, experts, lambda vectors: sum(vectors) / len(vectors), scaling)

    def tensor(name: str) -> Tensor:
        if name not in merged:
            return others[name]
        return (base[name].float() + lefts[name] @ merged[name]).to(base[name].dtype).contiguous()

    return Merged(StateDict(base, tensor))


def _left(origin: Tensor, experts: list[Tensor]) -> Tensor:
    """U of the task vectors beside each other: (d_out, directions that are there), orthonormal columns."""
    return triplets(torch.cat([own.float() - origin.float() for own in experts], dim=1)).left
