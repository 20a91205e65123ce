"""Merges that work on whole matrices: singular triplets of task vectors, and the orthogonal factor of a matrix."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from twinbench.merging import compress
from twinbench.weights.state_dict import StateDict

Basis = Callable[[Tensor], Tensor]
SMALLEST_RIDGE = 1e-10  # of the mean of a Gram matrix's diagonal: what float64 tells from nothing


class Triplets(NamedTuple):
    """``left @ diag(values) @ right``: (d_out, k), (k,) and (k, d_in), by falling singular value.

    Triplets whose value is zero but for rounding are not there, so all vectors are orthonormal.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def matrixwise(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    solve: Callable[[list[Tensor]], Tensor],
    scaling: float,
    wanted: Callable[[str, Tensor], bool] = lambda name, tensor: True,
) -> StateDict:
    """``base + scaling * solve(task vectors)`` for matrices, ``base + scaling * mean(task vectors)`` for the others.

    What is not floating point is the base's; of a stack of matrices each is solved by itself.

    Args:
        solve: from the experts' task vectors of a matrix, (d_out, d_in) in float32, the merged one.
        wanted: of a matrix's name and tensor, whether it is solved; the mean otherwise.
    """

    def solved(vectors: list[Tensor]) -> Tensor:
        if vectors[0].dim() == 2:
            return solve(vectors)
        return torch.stack([solved(list(each)) for each in zip(*vectors, strict=True)])

    def merged(name: str) -> Tensor:
        origin = base[name]
        if not origin.is_floating_point():
            return origin
        vectors = [expert[name].float() - origin.float() for expert in experts.values()]
        whole = origin.dim() > 1 and wanted(name, origin)
        moved = solved(vectors) if whole else sum(vectors) / len(vectors)
        return (origin.float() + scaling * moved).to(origin.dtype).contiguous()

    return StateDict(base, merged)


def triplets(matrix: Tensor, rank: int | None = None, basis: Basis = compress.basis) -> Triplets:
    """The ``rank`` largest singular triplets of a matrix (d_out, d_in), float32; all of them without a rank.

    Args:
        basis: computes or remembers `twinbench.merging.compress.basis` of a matrix.
    """
    left, right = compress.svd(matrix, min(matrix.shape) if rank is None else rank, basis)
    if matrix.shape[0] >= matrix.shape[1]:  # the values are folded into the left factor
        values = left.norm(dim=0)
        return Triplets(left / values, values, right)
    values = right.norm(dim=1)
    return Triplets(left, values, right / values[:, None])


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal factor ``P Q^T`` of a matrix ``P diag(s) Q^T``: of all such the nearest to it.

    Directions that the matrix has not got stay zero.
    """
    if not matrix.numel():
        return matrix
    found = triplets(matrix)
    return found.left @ found.right


def by_gram(pulled: Tensor, gram: Tensor, ridge: float = SMALLEST_RIDGE) -> Tensor:
    """``pulled @ gram^-1`` in float64, for a Gram matrix (n, n) that may lack directions, in which the result is 0.

    Args:
        pulled: (m, n), with nothing in directions that the Gram matrix lacks.
        ridge: added to the diagonal, as a share of its mean; ten times as much, and so on, where that leaves the
            matrix without a Cholesky factor.

    Raises:
        ValueError: the matrix is not finite.
    """
    gram, pulled = gram.double(), pulled.double()
    added = ridge * (float(gram.diagonal().mean()) or 1.0)
    while added < float("inf"):
        factor, failed = torch.linalg.cholesky_ex(gram + added * torch.eye(len(gram), dtype=gram.dtype))
        if not failed:
            return torch.cholesky_solve(pulled.T, factor).T.float()
        added *= 10
    raise ValueError("a Gram matrix is not finite")
