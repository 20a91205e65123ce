"""DARE on TIES: the task vectors are dropped and rescaled as in `dare`, then merged as in `ties`.

"Language Models are Super Mario", Yu et al., ICML 2024, arXiv 2311.03099; its merger is TIES-Merging, arXiv 2306.01708.
"""

from collections.abc import Mapping

from torch import Tensor

from baselines import ties
from baselines.dare import drop_and_rescale, thinned
from twinbench.merging.compress import generator
from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import Combine, by_pieces


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    keep: float,
    density: float,
    scaling: float,
    scope: str,
    aggregate: str,
    seed: int,
) -> Merged:
    """Drop and rescale by DARE, then trim, elect and merge by TIES.

    Args:
        keep: fraction of weights that DARE keeps, in (0, 1].
        density: fraction of weights that TIES keeps of what DARE left, in (0, 1].

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    whole = drop_and_rescale(base, experts, keep, seed)  # a tensor at a time, for thresholds
    elect = ties.combiner(base, whole, density, scaling, scope, aggregate)

    def combine(name: str) -> Combine:
        draws, merge_piece = [generator(seed, task, name) for task in experts], elect(name)

        def merged(origin: Tensor, pieces: list[Tensor]) -> Tensor:
            drawn = zip(pieces, draws, strict=True)
            return merge_piece(origin, [origin + thinned(piece - origin, keep, draw) for piece, draw in drawn])

        return merged

    return Merged(by_pieces(base, experts, combine))
