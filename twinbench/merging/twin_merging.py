"""Twin-Merging: "Dynamic Integration of Modular Expertise in Model Merging", Lu et al., NeurIPS 2024, arXiv 2406.15479.

``theta(x) = theta_s + sum_t w_t(x) * C(theta_t - theta_s)`` (Eq. 3): theta_s is the shared expert, made by any static
method; C keeps what is exclusive to task t in compressed form (truncated SVD by default); w = softmax(R(x)) comes from
a router. The paper's theta_t is ``experts[t]``, its v_t our exclusive part, its rank r ours.

Departures from the authors' code: factors stay factored; the rank is at least 1, so tensors of a single row (token
types) are kept; each matrix of a stack (a mixture's experts in one tensor) is compressed by itself; biases belong to
the merged weights unless the protocol is ``paper``. As there, vectors stay dense.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from twinbench.merging.compress import bernoulli, generator, magnitude, svd
from twinbench.merging.factored import Factors, beyond
from twinbench.merging.merged import Merged
from twinbench.weights.parts import Part
from twinbench.weights.state_dict import StateDict

ROUTE = "router"
DRAWS = {"compression": ["bernoulli"]}  # a seed changes nothing else


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    shared: Mapping[str, Tensor],
    compression: str,
    rank_ratio: float | None,
    density: float | None,
    seed: int,
    basis: Callable[[Tensor], Tensor],
) -> Merged:
    """Split every expert into the shared expert and a compressed exclusive part.

    Args:
        shared: the shared expert theta_s, the shared part of any static method.
        compression: "svd", "magnitude", "bernoulli" or "none".
        rank_ratio: svd only: kept fraction of a matrix's min(d_out, d_in) singular values, in (0, 1].
        density: magnitude and bernoulli only: kept fraction of a matrix's elements, in (0, 1].
        seed: of the Bernoulli masks.
        basis: `twinbench.merging.compress.basis`, or something that remembers what it gave.

    Raises:
        ValueError: a hyperparameter is out of range or does not belong to the compression.
    """
    given = {name: value for name, value in (("rank_ratio", rank_ratio), ("density", density)) if value is not None}
    wanted = {"svd": {"rank_ratio"}, "magnitude": {"density"}, "bernoulli": {"density"}, "none": set()}
    if compression not in wanted:
        raise ValueError(f"compression must be one of {', '.join(wanted)}; got {compression!r}")
    if given.keys() != wanted[compression]:
        raise ValueError(
            f"compression={compression} takes {', '.join(wanted[compression]) or 'neither rank_ratio nor density'} "
            f"(the other null), got rank_ratio={rank_ratio}, density={density}"
        )
    for name, value in given.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value}")

    def part(task: str, name: str) -> Part:
        delta = experts[task][name].float() - shared[name].float()
        if delta.dim() < 2 or compression == "none":
            return delta
        if compression == "svd":
            return svd(delta, max(1, int(rank_ratio * min(delta.shape[-2:]))), basis)
        if compression == "magnitude":
            return magnitude(delta, density)
        return bernoulli(delta, density, generator(seed, task, name))

    return Merged(shared, {t: StateDict(base, lambda name, t=t: part(t, name)) for t in experts})


def factored(
    base: Mapping[str, Tensor],
    adapters: Mapping[str, Factors],
    *,
    shared: Merged,
    compression: str,
    rank_ratio: float | None,
    density: float | None,
    seed: int,
    basis: Callable[[Tensor], Tensor],
) -> Merged:
    """The same for LoRA experts that stay factors: the truncated SVD of a sum of factors is exact.

    Args:
        shared: the shared expert in factored form, that of any linear static method.

    Raises:
        ValueError: the compression keeps no factors.
    """
    if compression != "svd":
        raise ValueError(f"suite.factored=true keeps factors: compression must be svd, got {compression!r}")
    return beyond(adapters, shared, rank_ratio)
