"""Fisher merging: "Merging Models with Fisher-Weighted Averaging", Matena and Raffel, NeurIPS 2022, arXiv 2111.09832.

``shared = sum_t (c_t F_t + r) * expert_t / sum_t (c_t F_t + r)``, weight by weight (Eq. 4): F_t is the diagonal of the
Fisher information of expert t on its own training inputs, an expectation over the labels that it predicts. With
``normalize`` c_t = 1 / ||F_t||_2 over all tensors, so that no expert counts more because its gradients are larger;
without it c_t = 1. r is ``ridge`` times the mean of the c_t, the same for all experts. The paper's lambda_i are our
c_t, its theta_i ``experts[t]``. There are no exclusive parts.

Departures: the paper searches the lambda_i on validation data. The authors' code raises smaller values to the ridge
before it scales; then, where no expert has information, the one with the smallest norm wins. Here the ridge is added
after the scaling, so that there the plain average is left.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import Combine, StateDict, by_pieces


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    rows: int,
    normalize: bool,
    ridge: float,
    fisher: Callable[[str, int], Mapping[str, Tensor]],
) -> Merged:
    """Average all tensors, each weight in proportion to its Fisher information.

    Args:
        rows: training rows of each expert's task that its information is measured on.
        normalize: whether each expert's information is divided by its norm.
        ridge: added to the scaled information, as a share of the mean scale; above 0.
        fisher: from an expert and the number of rows, the diagonal of its Fisher information by tensor name, in the
            tensors' shapes; a tensor without one has no information.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge must be above 0, got {ridge}")
    information = {expert: fisher(expert, rows) for expert in experts}
    scales = [1 / (_norm(own) or 1.0) if normalize else 1.0 for own in information.values()]
    least = ridge * sum(scales) / max(1, len(scales))

    def combine(name: str) -> Combine:
        def averaged(_: Tensor, pieces: list[Tensor]) -> Tensor:
            values, importance = pieces[: len(experts)], pieces[len(experts) :]
            total, weights = torch.zeros_like(values[0]), torch.zeros_like(values[0])
            for value, own, scale in zip(values, importance, scales, strict=True):
                weight = scale * own + least
                total += weight * value
                weights += weight
            return total / weights

        return averaged

    beside = {f"{expert}, information": _filled(base, own) for expert, own in information.items()}
    return Merged(by_pieces(base, {**experts, **beside}, combine))


def _filled(base: Mapping[str, Tensor], information: Mapping[str, Tensor]) -> StateDict:
    """The information of every tensor, zeros where there is none."""
    return StateDict(base, lambda name: information[name] if name in information else torch.zeros_like(base[name]))


def _norm(information: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all tensors."""
    return sum(float(tensor.double().square().sum()) for tensor in information.values()) ** 0.5
