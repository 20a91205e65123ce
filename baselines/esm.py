"""ESM, essential subspace merging: CVPR 2026, and its extension arXiv 2606.19164.

TSV-M (`baselines.tsv_m`) keeps the directions in which a task vector is largest; ESM those in which it moves the
layer's outputs most. With G_t the second moments of layer inputs X_t that expert t sees on its own training rows,
E_t D_t E_t^T the leading k = floor(d_out / T) part of ``tau_t G_t tau_t^T``, and ``C_t = E_t^T tau_t``::

    g_t = (D_t / mean D_t)^power, divided by its mean
    U = polar([E_1 g_1 .. E_T g_T]),  V = polar([g_1 C_1; ..; g_T C_T]),  each times its mean singular value
    tau = U V (||U V|| / mean of that over the layers of the same kind)^2,   shared = base + scaling * tau

Layers of one kind have the same name but for the number of their block. Other matrices are merged by TSV-M's rule;
what is no matrix moves by ``scaling`` times the mean task vector. The paper's alpha is ``scaling``.

Departures from the authors' code: it takes the inputs, and its alpha, from labelled validation rows; training rows and
a setting here. In TSV-M's rule it multiplies each side by its mean singular value, which is at most 1, too. Where there
are fewer directions than k, it fills up with columns of the identity; here those directions are left out.
"""

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from baselines import tsv_m
from twinbench.merging.merged import Merged
from twinbench.merging.spectral import polar, triplets
from twinbench.weights.state_dict import StateDict


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    rows: int,
    power: float,
    scaling: float,
    gram: Callable[[str, int], Mapping[str, Tensor]],
    basis: Callable[[Tensor], Tensor],
) -> Merged:
    """Merge linear layers in the directions that move their outputs, and other tensors as TSV-M does.

    Args:
        rows: training rows of each expert's task that its layers' inputs are taken from.
        power: how much more the directions count that move outputs more, at least 0.
        gram: from an expert and the number of rows, G_t (d_in, d_in) by the name of the layer's weight (d_out, d_in).
        basis: `twinbench.merging.compress.basis`, or something that remembers what it gave.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if not 0 <= power < math.inf:
        raise ValueError(f"power must be at least 0, got {power}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    grams = {expert: gram(expert, rows) for expert in experts}
    others = tsv_m.merge(base, experts, scaling=scaling, basis=basis).shared
    moved = {}
    for name in base:
        if all(name in own for own in grams.values()):
            vectors = [expert[name].float() - base[name].float() for expert in experts.values()]
            moved[name] = essential(vectors, [own[name].float() for own in grams.values()], power)
    sizes: dict[str, list[float]] = {}
    for name, tau in moved.items():
        sizes.setdefault(_kind(name), []).append(float(tau.norm()))

    def tensor(name: str) -> Tensor:
        if name not in moved:
            return others[name]
        tau, alike = moved[name], sizes[_kind(name)]
        louder = float(tau.norm()) / (sum(alike) / len(alike) or 1.0)
        return (base[name].float() + scaling * louder**2 * tau).to(base[name].dtype).contiguous()

    return Merged(StateDict(base, tensor))


def essential(vectors: list[Tensor], grams: list[Tensor], power: float) -> Tensor:
    """The merged task vector of a layer, before layers are compared."""
    kept = max(1, len(vectors[0]) // len(vectors))
    lefts, rights = [], []
    for vector, gram in zip(vectors, grams, strict=True):
        directions, energy = moving(vector, gram, kept)
        weight = (energy / energy.mean().clamp(min=torch.finfo(energy.dtype).tiny)) ** power
        weight = weight / weight.mean().clamp(min=torch.finfo(weight.dtype).tiny)
        lefts.append(directions * weight)
        rights.append(weight[:, None] * (directions.T @ vector))
    left, right = torch.cat(lefts, dim=1), torch.cat(rights)
    return _isotropic(left) @ _isotropic(right)


def moving(vector: Tensor, gram: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors (d_out, k) and eigenvalues (k,) of ``tau G tau^T``: squares of what ``tau G^1/2`` has."""
    values, vectors = torch.linalg.eigh(gram.double())
    root = (vectors * values.clamp(min=0).sqrt()).to(vector)
    found = triplets(vector @ root, kept)
    return found.left, found.values.square()


def _isotropic(matrix: Tensor) -> Tensor:
    """Its orthogonal factor times the mean of its singular values."""
    return triplets(matrix).values.mean() * polar(matrix) if matrix.any() else matrix


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
