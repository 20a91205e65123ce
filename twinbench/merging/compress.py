"""Compression of one exclusive matrix: truncated SVD, magnitude pruning, Bernoulli dropout (Twin-Merging, section 4.6).

Each function takes a difference of weights and returns a part (`twinbench.weights.parts`), which stays compressed.
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from twinbench.system.mistakes import Mistake
from twinbench.weights.parts import LowRank, Sparse, packed


def basis(matrix: Tensor) -> Tensor:
    """Singular vectors of a matrix on its smaller side, (n, n) with n = min(d_out, d_in), by falling singular value.

    With A = U S V^T they solve the symmetric eigenproblem A^T A = V S^2 V^T (A A^T = U S^2 U^T for a wide matrix), so
    repeated or zero singular values, zero rows and a tall (50,265 x 768) matrix are all ordinary cases. It is solved in
    float64, where singular values down to 1e-8 of the largest are told apart.

    Args:
        matrix: (d_out, d_in), finite; the work is done on its device.
    """
    wide = matrix.double()
    gram = wide.T @ wide if matrix.shape[0] >= matrix.shape[1] else wide @ wide.T
    try:
        vectors = torch.linalg.eigh(gram).eigenvectors
    except torch.linalg.LinAlgError:  # divide and conquer did not converge; the QR algorithm is slow and steady
        import scipy.linalg  # a quarter of a second that is almost never needed

        vectors = torch.from_numpy(scipy.linalg.eigh(gram.cpu().numpy(), driver="ev")[1])
    return vectors.flip(1).to(matrix)


def svd(delta: Tensor, rank: int, basis: Callable[[Tensor], Tensor] = basis) -> LowRank:
    """Best rank-``rank`` approximation of a matrix (Eckart-Young): (A V_r) V_r^T, or U_r (U_r^T A) for a wide one.

    Neither the other side's vectors nor a division by singular values is needed. Columns of ``left`` and rows of
    ``right`` are in falling order of singular value, so a smaller rank is a slice.

    Args:
        delta: (d_out, d_in), or a stack of such matrices (..., d_out, d_in), each factored by itself; finite.
        rank: number of singular triplets kept, at least 1; more than min(d_out, d_in) keeps all. Those that are zero
            but for rounding are not stored: a zero matrix stores nothing, a LoRA expert beside its base the adapter's
            rank.
        basis: computes or remembers `basis` of a matrix.

    Raises:
        ValueError: the rank is below 1, or the matrix holds NaN or infinity.
    """
    if rank < 1:
        raise Mistake(f"rank must be at least 1, got {rank}")
    bounds = torch.stack(torch.aminmax(delta))  # one pass tells NaN, infinity and zero
    if not torch.isfinite(bounds).all():
        raise Mistake("cannot factor a matrix with NaN or infinite elements")
    if not bounds.any():
        *stack, d_out, d_in = delta.shape
        return LowRank(delta.new_zeros(*stack, d_out, 0), delta.new_zeros(*stack, 0, d_in))
    if delta.dim() > 2:
        vectors = torch.stack([basis(matrix) for matrix in delta.flatten(0, -3)]).unflatten(0, delta.shape[:-2])
    else:
        vectors = basis(delta)
    top = vectors[..., :rank]
    left, right = (delta @ top, top.mT) if delta.shape[-2] >= delta.shape[-1] else (top, top.mT @ delta)
    values = (left if delta.shape[-2] >= delta.shape[-1] else right.mT).norm(dim=-2)  # (..., rank) singular values
    rounding = max(delta.shape[-2:]) * torch.finfo(delta.dtype).eps * values.max(-1, keepdim=True).values
    kept = int((values > rounding).sum(-1).max())
    return LowRank(left[..., :kept].contiguous(), right[..., :kept, :].contiguous())


def magnitude(delta: Tensor, density: float) -> Sparse:
    """Keep the ``density`` fraction of elements that is largest in absolute value."""
    kept = max(1, round(density * delta.numel()))
    top = delta.abs().flatten().topk(kept).indices
    return _sparse(delta, torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device).index_fill_(0, top, True))


def bernoulli(delta: Tensor, density: float, generator: torch.Generator) -> Sparse:
    """Keep each element with probability ``density`` and rescale what is kept by 1/density (DARE, arXiv 2311.03099)."""
    kept = torch.rand(delta.numel(), generator=generator) < density
    return _sparse(delta / density, kept.to(delta.device))


def generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the names alone, not on the order in which tensors are visited."""
    return torch.Generator().manual_seed(zlib.crc32("/".join((str(seed), *names)).encode()))


def _sparse(values: Tensor, kept: Tensor) -> Sparse:
    return Sparse(values.flatten()[kept], packed(kept), tuple(values.shape))
