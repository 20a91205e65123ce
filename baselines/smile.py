"""SMILE: "Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained Foundation Models", Tang et al.,
2024, arXiv 2408.10174.

Every linear layer becomes a small mixture, for each token by itself, and nothing is trained::

    y = W_0 x + b_0 + sum_i w_i(x) (U_i S_i V_i^T x + b_i - b_0)
    w = softmax over the top_k largest of r_i = || V_{i,1:k_gate}^T x ||_2

U_i S_i V_i^T is the truncated SVD of tau_i = W_i - W_0. The paper's k is ``rank``, its k_gate ``gate_rank``, its K
``top_k``. All other tensors, embeddings and norms among them, stay those of the base.

A linear layer's weight is here a matrix named ``MODULE.weight`` whose module is not called like those in `TABLES`,
which are embeddings; a bias is its if it has the same name with ``bias``. If such a module is no linear layer, the run
is refused. A layer whose weight and bias no expert changes has no gate.

Departures from the authors' code: singular values that are rounding, as `torch.linalg.matrix_rank` judges them, give
the gate no direction, where the code takes arbitrary ones; a layer of which only the bias changes is kept, where the
code leaves it out; experts that tie for the last place are all kept.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from twinbench.merging.compress import svd
from twinbench.merging.gates import Projections
from twinbench.merging.merged import Merged
from twinbench.weights.parts import LowRank, Part
from twinbench.weights.state_dict import StateDict

ROUTE = "layer"
# How the modules are called whose rows are looked up: no linear layers.
TABLES = (
    "embed",
    "embedding",
    "embeddings",
    "embed_tokens",
    "embed_positions",
    "wte",
    "wpe",
    "shared",
    "relative_attention_bias",
)


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    rank: int,
    gate_rank: int,
    top_k: int,
    basis: Callable[[Tensor], Tensor],
) -> Merged:
    """Give every linear layer low-rank experts beside the base's weight, and a gate that knows them by their inputs.

    Args:
        rank: singular triplets kept of each expert's change of a matrix, at least 1; more than there are keeps all.
        gate_rank: right singular vectors of each expert that the gate reads, at least 1; likewise.
        top_k: experts whose parts act on a token, in [1, number of experts].
        basis: `twinbench.merging.compress.basis`, or something that remembers what it gave: it is asked for each
            matrix twice, for the part and for the gate.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    for name, value, most in (("rank", rank, None), ("gate_rank", gate_rank, None), ("top_k", top_k, len(experts))):
        if value < 1 or (most is not None and value > most):
            raise ValueError(f"{name} must be at least 1{f' and at most {most}' if most else ''}, got {value}")

    def delta(task: str, name: str) -> Tensor:
        return experts[task][name].float() - base[name].float()

    def part(task: str, name: str) -> Part:
        change = delta(task, name)
        return svd(change, rank, basis) if change.dim() == 2 else change

    def gate(name: str) -> Projections:
        found = [directions(svd(delta(task, name), gate_rank, basis)) for task in experts]
        most = max(len(rows) for rows in found)
        return Projections(torch.stack([_filled(rows, most) for rows in found]), top_k)

    layers = [name for name in base if is_linear(name, base[name]) and _changed(name, base, experts)]
    own = [part for name in layers for part in (name, bias_of(name)) if part in base]
    exclusive = {t: StateDict(own, lambda name, t=t: part(t, name)) for t in experts}
    return Merged(base, exclusive, gates=StateDict(layers, gate))


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is the weight of a linear layer, by its name and its shape."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    return name.endswith(".weight") and tensor.dim() == 2 and not module.endswith(TABLES)


def bias_of(name: str) -> str:
    """The name of a layer's bias by that of its weight."""
    return f"{name.removesuffix('weight')}bias"


def directions(factors: LowRank) -> Tensor:
    """Right singular vectors of a matrix in the factors that `svd` gives, as rows (k, d_in) of unit length.

    Of left @ right = U S V^T one factor has orthonormal vectors and the other the singular values in it: (U S) V^T, or
    U (S V^T) for a wide matrix. A vector whose singular value is rounding becomes 0.
    """
    left, right = factors
    lengths = right.norm(dim=1, keepdim=True)
    values = left.norm(dim=0)[:, None] * lengths
    least = values.amax() * max(len(left), right.shape[1]) * torch.finfo(right.dtype).eps if len(values) else 0.0
    return torch.where(values > least, right / lengths, 0.0)


def _changed(name: str, base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether some expert has another weight or bias in a linear layer than the base."""
    both = [part for part in (name, bias_of(name)) if part in base]
    return any(not torch.equal(expert[part], base[part]) for part in both for expert in experts.values())


def _filled(rows: Tensor, count: int) -> Tensor:
    """Rows with zeros below them, so that there are ``count``."""
    return torch.nn.functional.pad(rows, (0, 0, 0, count - len(rows)))
