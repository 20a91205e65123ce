"""Merges of LoRA experts that never leave factored form: no dense difference is formed, whatever the base's size.

Expert t adapts a matrix by tau_t = s_t B_t A_t (`weights.lora.read_factors`). A sum of such products is one product
of factors side by side, so Task Arithmetic's shared difference, lambda sum_t tau_t, and what a task has beyond it,
tau_t - shared, are exact; what Twin-Merging keeps of the latter (arXiv 2406.15479, Eq. 3) is an exact truncated SVD.

The shared difference is kept as each adapter's share of it, in `Merged.always`: apart, they are no wider than the
exclusive parts, to whose rank `routing.attach` fills up.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from twinbench.merging.compress import svd
from twinbench.merging.merged import Merged
from twinbench.system.mistakes import Mistake
from twinbench.weights.parts import LowRank, dense, is_zero
from twinbench.weights.state_dict import listed

PROBED = (32, 16)  # shape of the random models that tell whether a method is linear: matrices, as all that LoRA adapts

Factors = Mapping[str, LowRank]  # by parameter name of the base; a name without factors is not changed


def static(method: Callable[..., Merged], base: Mapping[str, Tensor], adapters: Mapping[str, Factors]) -> Merged:
    """Merge LoRA experts by a static method that is linear in them, in factored form.

    Returns:
        The base as the shared part, and each adapter's share of the shared difference as what is always added.

    Raises:
        ValueError: the method is not linear in the experts.
    """
    found = coefficients(method, list(adapters))
    shares = [
        {name: LowRank(found[t] * part.left, part.right) for name, part in parts.items() if found[t]}
        for t, parts in adapters.items()
    ]
    return Merged(base, always=tuple(share for share in shares if share))


def whole(base: Mapping[str, Tensor], adapters: Mapping[str, Factors]) -> Merged:
    """Every adapter as it is, exclusive to its expert."""
    return Merged(base, {t: dict(parts) for t, parts in adapters.items()})


def beyond(adapters: Mapping[str, Factors], shared: Merged, rank_ratio: float) -> Merged:
    """Twin-Merging of LoRA experts: what each has beyond the shared expert, compressed (`exclusive`).

    Args:
        shared: the shared expert, as `static` gives it.
    """
    if not shared.always and rank_ratio == 1:  # the adapters themselves
        return whole(shared.shared, adapters)
    difference = {
        name: _sum(name, {str(at): (1.0, parts[name]) for at, parts in enumerate(shared.always) if name in parts})
        for name in _names(shared.always)
    }
    return Merged(shared.shared, exclusive(adapters, difference, rank_ratio), shared.always)


def coefficients(static: Callable[..., Merged], experts: Sequence[str]) -> dict[str, float]:
    """How much of each task vector a static method adds to the base: ``shared = base + sum_t c_t tau_t``.

    Found by merging small random models, so any method that is linear will do, and no list of them is kept.

    Raises:
        ValueError: what the method gives is no such sum (it trims, draws or elects).
    """
    generator = torch.Generator().manual_seed(0)
    origin, *others = torch.randn(1 + len(experts), *PROBED, generator=generator)
    given = {t: {"w": other} for t, other in zip(experts, others, strict=True)}
    difference = (static({"w": origin}, given).shared["w"] - origin).flatten()
    vectors = torch.stack([(other - origin).flatten() for other in others], 1).double()
    found = torch.linalg.lstsq(vectors, difference.double()[:, None]).solution[:, 0]
    if not torch.allclose(vectors @ found, difference.double(), atol=1e-4):
        raise Mistake(
            "suite.factored=true takes methods that are linear in the experts (task_arithmetic, average, expert, "
            "pretrained), alone or as the shared expert's; this one is not: use suite.factored=false"
        )
    return {t: round(value, 6) for t, value in zip(experts, found.tolist(), strict=True)}


def linear(adapters: Mapping[str, Factors], coefficients: Mapping[str, float]) -> dict[str, LowRank]:
    """The shared difference of a linear method, ``sum_t c_t tau_t``, of rank sum_t r_t.

    Task Arithmetic has c_t = lambda, the average of T experts 1/T.

    Raises:
        ValueError: a coefficient is not finite, or adapters have another shape for the same name.
    """
    if not all(map(math.isfinite, coefficients.values())):
        raise Mistake(f"coefficients must be finite, got {dict(coefficients)}")
    return {
        name: _sum(name, {t: (coefficients[t], parts[name]) for t, parts in adapters.items() if name in parts})
        for name in _names(adapters.values())
    }


def exclusive(adapters: Mapping[str, Factors], shared: Factors, rank_ratio: float) -> dict[str, dict[str, LowRank]]:
    """Twin-Merging's exclusive parts, ``svd_r(tau_t - shared)``, per expert; parts that are zero are left out.

    A name that only the shared difference has counts too: there the expert is the base, and its part takes the others
    away.

    Args:
        rank_ratio: r is this fraction of min(d_out, d_in), at least 1; in (0, 1].

    Raises:
        ValueError: rank_ratio is out of range, factors are not finite, or shapes differ.
    """
    if not 0 < rank_ratio <= 1:
        raise Mistake(f"rank_ratio must be in (0, 1], got {rank_ratio}")
    found = {}
    for t, parts in adapters.items():
        beyond = {name: _beyond(name, parts, shared, rank_ratio) for name in _names([parts, shared])}
        found[t] = {name: part for name, part in beyond.items() if not is_zero(part)}
    return found


def truncated(part: LowRank, rank: int) -> LowRank:
    """Best rank-``rank`` approximation of ``left @ right`` (Eckart-Young), without forming it.

    With left = Q1 R1 and right^T = Q2 R2 the singular values are those of the small core, R1 R2^T = U S V^T; the result
    is (Q1 U S) (V^T Q2^T). The work is done in float64, in O((d_out + d_in) k^2) for k columns. Singular values that
    rounding of the k products to float32 could have made count as zero, so where terms cancel nothing is kept.

    Args:
        rank: at least 1; more than there are keeps all. Nothing is kept of zero.

    Returns:
        LowRank: as `twinbench.merging.compress.svd`, by falling singular value, so a smaller rank is a slice.

    Raises:
        ValueError: the rank is below 1, or a factor holds NaN or infinity.
    """
    if rank < 1:
        raise Mistake(f"rank must be at least 1, got {rank}")
    if not all(torch.isfinite(factor).all() for factor in part):
        raise Mistake("cannot factor a matrix with NaN or infinite elements")
    left, right = part.left.double(), part.right.double()
    noise = torch.finfo(torch.float32).eps * (left.norm(dim=0) @ right.norm(dim=1))
    (q1, r1), (q2, r2) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, vt = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    kept = min(rank, int((s > noise).sum()))
    outer, inner = q1 @ (u[:, :kept] * s[:kept]), vt[:kept] @ q2.T
    return LowRank(outer.to(part.left).contiguous(), inner.to(part.right).contiguous())


def separate(
    adapters: Mapping[str, Factors], scaling: float, rank: int, weights: Sequence[float]
) -> dict[str, LowRank]:
    """What the authors' code adds to the base for one route: A and B are merged and compressed apart. To compare only.

    ``(B_s + sum_t w_t svd_rank(B_t - B_s)) (A_s + sum_t w_t svd_rank(A_t - A_s))`` with A_s = scaling sum_t A_t and B_s
    alike. The paper (appendix A) merges the differences B_t A_t. Here the product of sums has terms B_t A_u of two
    tasks, which nobody trained; the shared difference has scaling squared; the rank cuts factors, whose rank is the
    adapter's, so one at least as large leaves the exclusive parts whole. Adding (B U, U^-1 A) of an expert instead of
    (B, A), the same expert, gives another merge.

    The adapters' scale s is in ``left``; where it is the same for all, that is the same as a factor s at the end.

    Args:
        weights: one per adapter, in their order.

    Raises:
        ValueError: the adapters differ in names or shapes, ranks included; there are none; or the number of weights,
            scaling or rank is out of range.
    """
    if len(weights) != len(adapters) or not adapters:
        raise Mistake(f"weights must be one for each of at least 1 adapter, got {len(weights)} for {len(adapters)}")
    if not math.isfinite(scaling):
        raise Mistake(f"scaling must be finite, got {scaling}")
    lacking = [f"{name} of {t}" for name in _names(adapters.values()) for t in adapters if name not in adapters[t]]
    if lacking:
        raise Mistake(f"A and B merge apart only where all adapters have them, missing: {listed(lacking)}")

    def route(factors: list[Tensor]) -> Tensor:
        shared = scaling * sum(factors)
        return shared + sum(w * dense(svd(f - shared, rank)) for w, f in zip(weights, factors, strict=True))

    merged = {}
    for name in _names(adapters.values()):
        parts = {t: factors[name] for t, factors in adapters.items()}
        _check_shapes(name, {t: (tuple(part.left.shape), tuple(part.right.shape)) for t, part in parts.items()})
        merged[name] = LowRank(*(route(list(side)) for side in zip(*parts.values(), strict=True)))
    return merged


def _names(parts: Iterable[Factors]) -> dict[str, None]:
    """The union of names, in order of appearance."""
    return dict.fromkeys(name for factors in parts for name in factors)


def _beyond(name: str, parts: Factors, shared: Factors, rank_ratio: float) -> LowRank:
    terms = {"the expert": (1.0, parts), "the shared difference": (-1.0, shared)}
    whole = _sum(name, {who: (sign, of[name]) for who, (sign, of) in terms.items() if name in of})
    return truncated(whole, max(1, int(rank_ratio * min(whole.left.shape[0], whole.right.shape[1]))))


def _sum(name: str, terms: Mapping[str, tuple[float, LowRank]]) -> LowRank:
    """``sum_i c_i left_i right_i`` as one product of factors side by side."""
    _check_shapes(name, {who: (part.left.shape[0], part.right.shape[1]) for who, (_, part) in terms.items()})
    left = torch.cat([factor * part.left for factor, part in terms.values()], dim=1)
    return LowRank(left, torch.cat([part.right for _, part in terms.values()]))


def _check_shapes(name: str, shapes: Mapping[str, tuple]) -> None:
    if len(set(shapes.values())) > 1:
        raise Mistake(f"{name} differs in shape: {listed([f'{who} {shape}' for who, shape in shapes.items()])}")
