"""DARE on Task Arithmetic: "Language Models are Super Mario", Yu et al., ICML 2024, arXiv 2311.03099.

Each element of a task vector is dropped with probability p = 1 - density, and what is left is rescaled by 1/density:
``shared = base + scaling * sum_t m_t * (expert_t - base) / density`` with m_t ~ Bernoulli(density).

Departure from the authors' code: vectors (biases, LayerNorm) are dropped as matrices are, as the paper says.
"""

from collections.abc import Mapping

from torch import Tensor

from baselines import task_arithmetic
from twinbench.compress import bernoulli, dense, generator
from twinbench.merged import Merged
from twinbench.state_dict import StateDict


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    density: float,
    scaling: float,
    seed: int,
) -> Merged:
    """Drop, rescale, and merge by Task Arithmetic.

    Args:
        density: fraction of weights kept, in (0, 1]; 1 drops nothing.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    return task_arithmetic.merge(base, drop_and_rescale(base, experts, density, seed), scaling=scaling)


def drop_and_rescale(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], density: float, seed: int
) -> dict[str, StateDict]:
    """Experts whose task vectors are thinned to ``density`` and rescaled by its inverse."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")

    def thinned(task: str, name: str) -> Tensor:
        origin = base[name].float()
        vector = experts[task][name].float() - origin
        return origin + dense(bernoulli(vector, density, generator(seed, task, name)))

    return {task: StateDict(base, lambda name, task=task: thinned(task, name)) for task in experts}
