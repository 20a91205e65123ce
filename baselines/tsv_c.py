"""TSV-C: "Task Singular Vectors: Reducing Task Interference in Model Merging", Gargiulo et al., CVPR 2025,
arXiv 2412.00081 (its section on compression).

Each task keeps the leading k = floor(r / T) singular triplets of its task vector's matrices, r being the smaller side
and T the number of tasks: ``shared = base``, ``exclusive_t = SVD_k(expert_t - base)``, and w is one-hot at the known
task. So all tasks' factors together have about the size of one dense model. Vectors stay dense; k is at least 1.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from twinbench.merging.compress import svd
from twinbench.merging.merged import Merged
from twinbench.weights.parts import Part
from twinbench.weights.state_dict import StateDict

ROUTE = "task"


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    basis: Callable[[Tensor], Tensor],
) -> Merged:
    """Keep each task's leading triplets beside the base.

    Args:
        basis: `twinbench.merging.compress.basis`, or something that remembers what it gave.
    """
    names = [name for name in base if base[name].is_floating_point()]

    def part(task: str, name: str) -> Part:
        delta = experts[task][name].float() - base[name].float()
        return delta if delta.dim() < 2 else svd(delta, max(1, min(delta.shape[-2:]) // len(experts)), basis)

    return Merged(base, {task: StateDict(names, lambda name, task=task: part(task, name)) for task in experts})
