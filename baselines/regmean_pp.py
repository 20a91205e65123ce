"""RegMean++: "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging", Nguyen et
al., 2025, arXiv 2508.03121.

RegMean (`baselines.regmean`) asks what a layer sees in its own expert. In the merged model it sees what the merged
layers below make. So blocks are merged in order, from below::

    W = (sum_t W_t G_t) (sum_t G_t)^-1,   G_t of the inputs of expert t's block on top of the merged blocks below

Off the diagonal each G_t is multiplied by ``scaling``, the paper's alpha. Tensors that are no weights of linear layers
in blocks are averaged. Departures: those of RegMean; the forward pass through the merged blocks begins anew for each
block, where the authors' code keeps its hidden states.
"""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from baselines import average, regmean
from twinbench.merging.blocks import block, count
from twinbench.merging.merged import Merged


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    rows: int,
    scaling: float,
    ridge: float,
    prefix_gram: Callable[[Mapping[str, Tensor], str, int, Collection[str]], Mapping[str, Tensor]],
) -> Merged:
    """Merge block by block, each on the inputs that the merged blocks below give it.

    Args:
        rows, scaling, ridge: as in `regmean.merge`.
        prefix_gram: from a state, an expert, the number of its training rows and names of linear layers' weights, the
            G_t of these layers when the model holds the state.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    merged = dict(average.merge(base, experts).shared)
    regmean.merge({}, {}, rows=rows, scaling=scaling, ridge=ridge, gram=lambda *_: {})  # its checks, and no tensor
    places = {name: place for name in base if (place := block(name)) is not None}
    for number in range(count(base)):
        layers = [n for n, place in places.items() if place == number and n.endswith(".weight") and base[n].dim() == 2]
        upwards = [name for name, place in places.items() if place >= number]
        grams = {}
        for expert, state in experts.items():
            mixed = merged | {name: state[name] for name in upwards}
            grams[expert] = prefix_gram(mixed, expert, rows, layers)
        part = {name: base[name] for name in layers}
        merged |= regmean.merge(
            part, experts, rows=rows, scaling=scaling, ridge=ridge, gram=lambda expert, _, found=grams: found[expert]
        ).shared
    return Merged(merged)
