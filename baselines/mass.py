"""MASS: TSV-C's parts (`baselines.tsv_c`) without the known task: each row goes where an expert's directions hold it.

"MASS: MoErging through Adaptive Subspace Selection", Crisostomi et al., 2025, arXiv 2504.05342. No rows train its
router (``router=mass``): the residual of a hidden state beyond each expert's right singular vectors says whose it is.

This is the authors' *top1*: one expert a row, ``W = W_0 + U_t S_t V_t^T``. Their *topk* runs TSV-M on up to three
experts per row. Departures: the first pass is the base's, where the authors' default is TSV-M's; it reads the first
linear layer of a block, where they name one for each model (a feed-forward layer of a ViT, the output of an attention
in T5); vectors are the expert's own.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from baselines import tsv_c
from twinbench.merging.merged import Merged

ROUTE = "router"


def merge(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, basis: Callable[[Tensor], Tensor]
) -> Merged:
    """Keep each task's leading triplets beside the base, for a router to choose from.

    Args:
        basis: `twinbench.merging.compress.basis`, or something that remembers what it gave.
    """
    return tsv_c.merge(base, experts, basis=basis)
