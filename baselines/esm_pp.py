"""ESM++: ESM with low-rank experts and a route per layer, arXiv 2606.19164.

Beside a shared model (``method@shared=esm``) each linear layer has an expert of each task at low rank, in the
directions in which what the task lacks, ``delta_t = expert_t - shared``, moves the layer's outputs most::

    y = W_s x + b_s + B_t B_t^T delta_t x,   t = argmax_t cos(mean of x over the text's tokens, p_t)

B_t are the leading eigenvectors of ``delta_t G_t delta_t^T`` (G_t: second moments of the inputs that expert t sees on
its own training rows), and p_t the mean of these inputs. A whole text gets one expert per layer. The paper's r is
``rank``. All other tensors, biases and embeddings among them, are the shared model's.

Departures from the authors' code: it takes GLUE's validation rows, of which the test is drawn, and here it is training
rows; factors are float32, and biases are merged as the shared model's.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from baselines.esm import moving
from twinbench.merging.gates import Prototypes
from twinbench.merging.merged import Merged
from twinbench.weights.parts import LowRank
from twinbench.weights.state_dict import StateDict

ROUTE = "layer"


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    shared: Mapping[str, Tensor],
    rank: int,
    rows: int,
    gram: Callable[[str, int], Mapping[str, Tensor]],
    means: Callable[[str, int], Mapping[str, Tensor]],
) -> Merged:
    """Give every linear layer low-rank experts beside the shared weight, and a gate that knows them by mean inputs.

    Args:
        shared: the shared model, of any static method.
        rank: directions kept of each expert and layer, at least 1.
        rows: training rows of each expert's task that its layers' inputs are taken from.
        gram, means: from an expert and the number of rows, per linear layer's weight (d_out, d_in) the inputs' second
            moments (d_in, d_in) and their mean (d_in,).

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    for name, value in (("rank", rank), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    grams, seen = ({expert: ask(expert, rows) for expert in experts} for ask in (gram, means))
    layers = [name for name in base if all(name in own for own in grams.values())]

    def part(task: str, name: str) -> LowRank:
        delta = experts[task][name].float() - shared[name].float()
        directions, _ = moving(delta, grams[task][name].float(), rank)
        return LowRank(directions.contiguous(), directions.T @ delta)

    def gate(name: str) -> Prototypes:
        return Prototypes(torch.nn.functional.normalize(torch.stack([seen[task][name].float() for task in experts])))

    exclusive = {task: StateDict(layers, lambda name, task=task: part(task, name)) for task in experts}
    return Merged(shared, exclusive, gates=StateDict(layers, gate))
