"""Weight averaging: "Model soups", Wortsman et al., ICML 2022, arXiv 2203.05482 (uniform soup).

``shared = (1/T) sum_t expert_t``. The experts here are fine-tuned on different tasks, not on one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import by_pieces


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> Merged:
    """Average the experts, accumulating in float32."""

    def mean(origin: Tensor, pieces: list[Tensor]) -> Tensor:
        total = torch.zeros_like(origin)
        for piece in pieces:
            total += piece
        return total.div_(len(pieces))

    return Merged(by_pieces(base, experts, lambda name: mean))
