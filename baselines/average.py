"""Weight averaging: "Model soups", Wortsman et al., ICML 2022, arXiv 2203.05482 (uniform soup).

``shared = (1/T) sum_t expert_t``. The experts here are fine-tuned on different tasks, not on one.
"""

from collections.abc import Mapping

from torch import Tensor

from twinbench.merged import Merged
from twinbench.state_dict import StateDict


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> Merged:
    """Average the experts, accumulating in float32."""

    def mean(name: str) -> Tensor:
        total = sum(expert[name].float() for expert in experts.values())
        return (total / len(experts)).to(base[name].dtype)

    return Merged(StateDict(base, mean))
