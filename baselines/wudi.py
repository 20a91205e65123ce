"""WUDI-Merging: "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
Cheng et al., ICML 2025, arXiv 2503.08099.

For every linear layer's weight the merged task vector minimizes ``sum_t ||(tau - tau_t) tau_t^T||^2 / ||tau_t||^2``:
the rows of tau_t stand for the layer's inputs. With ``G_t = tau_t^T tau_t / ||tau_t||^2`` the gradient is ``2 (tau
sum_t G_t - sum_t tau_t G_t)``, so all that a step needs of the experts is two sums. ``shared = base + scaling * tau``.

``solver: adam`` is the authors': ``steps`` steps of Adam from sum_t tau_t, which stop before the minimum. ``closed``
is the minimum, ``tau = (sum_t tau_t G_t) (sum_t G_t)^-1``.

The authors' runner for RoBERTa leaves biases, norms and embeddings at the base (``others: base``); FusionBench's
moves them by ``scaling`` times their mean task vector (``mean``).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from baselines.smile import is_linear
from twinbench.merging.merged import Merged
from twinbench.merging.spectral import by_gram, matrixwise
from twinbench.weights.state_dict import StateDict


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    solver: str,
    steps: int,
    lr: float,
    scaling: float,
    others: str,
) -> Merged:
    """Solve for each linear layer's merged task vector.

    Args:
        solver: "adam" or "closed".
        steps: of Adam, at least 1.
        lr: of Adam, above 0.
        others: what tensors become that are no weights of linear layers: "mean", moved by the mean task vector, or
            "base".

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if solver not in ("adam", "closed"):
        raise ValueError(f"solver must be adam or closed, got {solver!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be above 0, got {lr}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if others not in ("mean", "base"):
        raise ValueError(f"others must be mean or base, got {others!r}")

    def solve(vectors: list[Tensor]) -> Tensor:
        grams, pulled = 0, 0
        for vector in vectors:
            wide = vector.double()
            own = wide.T @ wide / (float(wide.square().sum()) or 1.0)
            grams, pulled = grams + own, pulled + wide @ own
        if solver == "closed":
            return by_gram(pulled, grams)
        return _descended(sum(vectors), grams.float(), pulled.float(), steps, lr)

    solved = matrixwise(base, experts, solve, scaling, is_linear)
    if others == "mean":
        return Merged(solved)
    return Merged(StateDict(base, lambda name: solved[name] if is_linear(name, base[name]) else base[name]))


def _descended(start: Tensor, grams: Tensor, pulled: Tensor, steps: int, lr: float) -> Tensor:
    """Adam's steps down the gradient ``2 (tau grams - pulled)``."""
    with torch.inference_mode(False):
        tau = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([tau], lr=lr)
        for _ in range(steps):
            tau.grad = 2 * (tau.detach() @ grams - pulled)
            optimizer.step()
    return tau.detach()
