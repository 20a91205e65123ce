"""One forward for a batch whose samples have different routes, without building any merged weights.

Twin-Merging's Eq. 3 moves from the weights to the activations: for a linear layer and the factors of each exclusive
part ``y = W_s x + sum_t w_t L_t (R_t x)``; an embedding gathers rows of L_t instead; vectors (biases, LayerNorm) are
mixed per sample. `attach` adds this to a model by forward hooks, so its modules, names and state dict stay those of the
shared expert.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinbench.compress import LowRank, Part, dense


class Routes:
    """The router weights of the batch that is in the model now, (batch, experts)."""

    weights: Tensor


@contextmanager
def attach(model: nn.Module, exclusive: Mapping[str, Mapping[str, Part]]) -> Iterator[Routes]:
    """Let ``model``, which holds the shared weights, add the exclusive parts while the context lasts.

    Args:
        exclusive: per expert, parts by parameter name of ``model``. The experts' order is that of the weights.

    Yields:
        Routes: set its ``weights`` before each forward; their batch size must be the inputs'.

    Raises:
        ValueError: a part belongs to a module that is no Linear, Embedding or LayerNorm.
    """
    routes, handles = Routes(), []
    device = next(model.parameters()).device
    try:
        for name, module in model.named_modules():
            parts = {
                parameter: {
                    position: _moved(expert[f"{name}.{parameter}"], device)
                    for position, expert in enumerate(exclusive.values())
                    if f"{name}.{parameter}" in expert
                }
                for parameter, _ in module.named_parameters(recurse=False)
            }
            if any(parts.values()):
                handles.append(module.register_forward_hook(_hook(name, module, parts, routes)))
        yield routes
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, module: nn.Module, parts: dict[str, dict[int, Part]], routes: Routes):
    weight, bias = parts["weight"], parts.get("bias", {})
    if isinstance(module, nn.Linear):
        apply = [
            _matrix_term(weight, F.linear, lambda x, left, right, w: (x @ right.T * w) @ left.T),
            _vector_term(bias),
        ]
        return lambda _, inputs, output: output + sum(term(inputs[0], output, routes.weights) for term in apply)
    if isinstance(module, nn.Embedding):
        add = _matrix_term(weight, F.embedding, lambda ids, left, right, w: (F.embedding(ids, left) * w) @ right)
        return lambda _, inputs, output: output + add(inputs[0], output, routes.weights)
    if isinstance(module, nn.LayerNorm):
        scale, shift = _vector_term(weight), _vector_term(bias)

        def normalized(_, inputs, output):
            plain = F.layer_norm(inputs[0], module.normalized_shape, eps=module.eps)
            return output + plain * scale(inputs[0], output, routes.weights) + shift(inputs[0], output, routes.weights)

        return normalized
    raise ValueError(f"routed inference knows Linear, Embedding and LayerNorm; {name} is a {type(module).__name__}")


def _matrix_term(parts: dict[int, Part], full, factored):
    """sum_t w_t * (part_t applied to x) for matrices: all low-rank parts in two products, the others one by one."""
    low = {t: part for t, part in parts.items() if isinstance(part, LowRank)}
    whole = {t: dense(part) for t, part in parts.items() if t not in low}
    left = torch.cat([part.left for part in low.values()], 1) if low else None
    right = torch.cat([part.right for part in low.values()], 0) if low else None
    owner = torch.tensor([t for t, part in low.items() for _ in range(part.left.shape[1])], dtype=torch.long)

    def term(x: Tensor, output: Tensor, weights: Tensor) -> Tensor:
        total = 0.0
        if low:
            total = factored(x, left, right, _per_sample(weights[:, owner.to(weights.device)], output))
        for t, matrix in whole.items():
            if weights[:, t].any():
                total = total + full(x, matrix) * _per_sample(weights[:, t : t + 1], output)
        return total

    return term


def _vector_term(parts: dict[int, Part]):
    """sum_t w_t * part_t for vectors: one (batch, 1.., d) tensor."""
    stacked = torch.stack([dense(part) for part in parts.values()]) if parts else None
    owner = list(parts)

    def term(_: Tensor, output: Tensor, weights: Tensor) -> Tensor | float:
        return _per_sample(weights[:, owner] @ stacked, output) if parts else 0.0

    return term


def _per_sample(values: Tensor, output: Tensor) -> Tensor:
    """(batch, k) as (batch, 1.., k), to broadcast over the positions of ``output``."""
    return values.view(values.shape[0], *[1] * (output.dim() - 2), values.shape[1])


def _moved(part: Part, device: torch.device) -> Part:
    return (
        part.to(device)
        if isinstance(part, Tensor)
        else type(part)(*(p.to(device) if isinstance(p, Tensor) else p for p in part))
    )
