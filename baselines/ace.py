"""ACE-Merging: "Data-Free Model Merging with Adaptive Covariance Estimation", Xu et al., CVPR 2026, arXiv 2603.02945.

The covariance of a layer's inputs is estimated by that of its task vector's rows. With ``t_t = ||tau_t||^2``, tau~_t
the task vector's matrix less the mean of its rows, and ``Sigma_t = tau~_t^T tau~_t``::

    A = sum_t (Sigma_t + eps_t I) + C,   B = sum_t tau~_t (Sigma_t + eps_t I),   tau = B A^-1

every row of C being the column means of sum_t Sigma_t. The experts' norms differ much where Var(log t) / mean(log t)^2
> ``uneven``. Then Sigma_t and eps_t are divided by tr Sigma_t, C is taken of these and divided by the mean of t, and
the spectrum is refined. Let ``D = sum_t tau_t (Sigma_t - mean_u (Sigma_u + eps_u I)) + tau``. Its leading ``refined``
share of directions, all with their mean singular value, is added to tau. ``shared = base + scaling * tau``; the
paper's epsilon is ``ridge``. Tensors that are no matrices move by ``scaling`` times the mean task vector.

As in the authors' code, the rows' mean is not added back, though the paper's formula reads the matrix itself; with one
expert the result is not that expert, because of C. Departure: their code leaves out ``text_projection``.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.merging.spectral import matrixwise, triplets


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    ridge: float,
    uneven: float,
    refined: float,
    scaling: float,
) -> Merged:
    """Solve for each matrix's merged task vector in closed form.

    Args:
        ridge: epsilon, above 0; it has the unit of a squared weight.
        uneven: from which spread of the experts' log norms on they are made equal and the spectrum is refined.
        refined: share of the directions whose singular values are made equal then, in [0, 1].

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    if not uneven >= 0:
        raise ValueError(f"uneven must be at least 0, got {uneven}")
    if not 0 <= refined <= 1:
        raise ValueError(f"refined must be in [0, 1], got {refined}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")

    def solve(vectors: list[Tensor]) -> Tensor:
        differ = _spread(vectors) > uneven
        centred = [vector - vector.mean(0) for vector in vectors]
        sigmas = [matrix.T @ matrix for matrix in centred]
        traces = [float(sigma.trace()) or 1.0 for sigma in sigmas]
        if differ:
            sigmas = [sigma / trace for sigma, trace in zip(sigmas, traces, strict=True)]
        constant = sum(sigmas).mean(0)
        if differ:
            constant = constant / (sum(float(vector.square().sum()) for vector in vectors) / len(vectors))
        ridges = [ridge / trace if differ else ridge for trace in traces]
        each = [sigma + own * torch.eye(len(sigma)) for sigma, own in zip(sigmas, ridges, strict=True)]
        pulled = sum(matrix.double() @ own.double() for matrix, own in zip(centred, each, strict=True))
        tau = torch.linalg.solve((sum(each) + constant).double().T, pulled.T).T.float()
        return tau + _refinement(vectors, sigmas, sum(each) / len(each), tau, refined) if differ else tau

    return Merged(matrixwise(base, experts, solve, scaling))


def _spread(vectors: list[Tensor]) -> float:
    """Var(log t) / mean(log t)^2 of the experts that changed the matrix; 0 where fewer than two did."""
    norms = torch.stack([vector.double().square().sum() for vector in vectors])
    logs = norms[norms > 0].log()
    return float(logs.var() / logs.mean().square()) if len(logs) > 1 else 0.0


def _refinement(vectors: list[Tensor], sigmas: list[Tensor], mean: Tensor, tau: Tensor, refined: float) -> Tensor:
    """The leading directions of what the covariances differ by from a mean one, and of tau, with one singular value."""
    kept = int(refined * min(tau.shape))
    if not kept:
        return torch.zeros_like(tau)
    found = triplets(sum(v @ (sigma - mean) for v, sigma in zip(vectors, sigmas, strict=True)) + tau, kept)
    return float(found.values.sum()) / kept * (found.left @ found.right)
