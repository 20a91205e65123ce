"""Routes taken in every linear layer, per token: the layer's gate weighs the experts' parts by the layer's own input.

A layer of a model that holds the shared weights gives ``W x + b``. Under `gated` it gives
``W x + b + sum_i w_i(x) (P_i x + b_i)``, where P_i and b_i are expert i's exclusive parts. Low-rank parts of all
experts stand side by side, so they cost two matrix products, and no merged weight is built.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from twinbench.merging.merged import Gate, Merged
from twinbench.system.mistakes import Mistake
from twinbench.weights.parts import LowRank, Part, dense
from twinbench.weights.state_dict import listed


@contextmanager
def gated(model: nn.Module, merged: Merged) -> Iterator[None]:
    """Let ``model``, which holds the shared weights, add the gated exclusive parts while the context lasts.

    Args:
        merged: names in ``exclusive`` and ``gates`` are parameters of ``model``. The experts' order is that of the
            gates' weights. Parts move to the device and the dtype of the layer's weight.

    Raises:
        Mistake: a part has no gate, a gate's layer is no ``nn.Linear``, or its weight is tied to another parameter.
            When the model has run for the first time: a layer with a gate was not called.
    """
    layers = _layers(model, merged)
    silent = dict.fromkeys(layers)
    mask: Tensor | None = None

    takes = inspect.signature(type(model).forward)

    def remember(_, args: tuple, named: dict) -> None:
        nonlocal mask
        given = takes.bind_partial(model, *args, **named).arguments.get("attention_mask")
        mask = given.bool() if given is not None and given.dim() == 2 else None

    def check(*_) -> None:
        if silent:
            raise Mistake(
                f"{type(model).__name__} ran without calling {listed(list(silent))}, so the parts there were left out: "
                "a route per layer needs a model that calls each linear layer with a gate"
            )

    with ExitStack() as stack:
        for name, (module, parts) in layers.items():

            def add(_, args: tuple, named: dict, output: Tensor, name: str = name, parts: "_Parts" = parts) -> Tensor:
                silent.pop(name, None)
                return output + parts(args[0] if args else named["input"], mask).to(output.dtype)

            stack.enter_context(module.register_forward_hook(add, with_kwargs=True))
        stack.enter_context(model.register_forward_pre_hook(remember, with_kwargs=True))
        stack.enter_context(model.register_forward_hook(check))
        yield


class _Parts:
    """The exclusive parts of one linear layer, of all experts, and the gate that weighs them."""

    def __init__(self, gate: Gate, weights: Mapping[int, Part], biases: Mapping[int, Part], experts: int, like: Tensor):
        """Put the parts side by side.

        Args:
            weights, biases: by position of the expert; an expert without a part adds nothing.
            experts: how many there are.
            like: the layer's weight, whose device and dtype the parts get.
        """
        self._gate, self._experts = gate.to(like.device), experts
        factors = {t: part for t, part in weights.items() if isinstance(part, LowRank)}
        self._owner = torch.tensor([t for t, part in factors.items() for _ in part.right], device=like.device)
        self._left = torch.cat([part.left for part in factors.values()], 1).to(like) if factors else None
        self._right = torch.cat([part.right for part in factors.values()]).to(like) if factors else None
        self._dense = {t: dense(part).to(like) for t, part in weights.items() if t not in factors}
        none = like.new_zeros(like.shape[0])
        rows = [dense(biases[t]).to(like) if t in biases else none for t in range(experts)]
        self._biases = torch.stack(rows) if biases else None

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the parts add to the layer's output: (..., d_out) of inputs (..., d_in)."""
        weights = self._gate.weights(x, mask)
        if weights.shape != (*x.shape[:-1], self._experts):
            wanted = (*x.shape[:-1], self._experts)
            raise ValueError(f"a gate must give weights of shape {wanted}, one per expert, got {tuple(weights.shape)}")
        weights, found = weights.to(x.dtype), []
        if self._left is not None:
            found.append(linear(linear(x, self._right) * weights[..., self._owner], self._left))
        found += [weights[..., t : t + 1] * linear(x, part) for t, part in self._dense.items()]
        if self._biases is not None:
            found.append(linear(weights, self._biases.T))
        return sum(found[1:], found[0])


def _layers(model: nn.Module, merged: Merged) -> dict[str, tuple[nn.Linear, _Parts]]:
    """By name of the weight, every linear layer that has parts."""
    weights, biases = {}, {}
    for position, (expert, parts) in enumerate(merged.exclusive.items()):
        for name, part in parts.items():
            module, _, kind = name.rpartition(".")
            owner = f"{module}.weight"
            if owner not in merged.gates or kind not in ("weight", "bias"):
                raise Mistake(
                    f"exclusive part {name} of {expert} has no gate, so nothing says with what weight it acts: a route "
                    "per layer takes weights and biases of linear layers that have a gate"
                )
            (weights if kind == "weight" else biases).setdefault(owner, {})[position] = part
    parameters, found = dict(model.named_parameters(remove_duplicate=False)), {}
    for name, gate in merged.gates.items():
        layer = _linear(model, name, parameters)
        given = weights.get(name, {}), biases.get(name, {})
        if any(given):
            found[name] = layer, _Parts(gate, *given, len(merged.exclusive), layer.weight.detach())
    return found


def _linear(model: nn.Module, name: str, parameters: Mapping[str, Tensor]) -> nn.Linear:
    """The linear layer whose weight has this name, and no other use."""
    if name not in parameters:
        raise Mistake(f"gate {name} belongs to no parameter of the {type(model).__name__}")
    layer = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(layer, nn.Linear):
        raise Mistake(f"gate {name} belongs to {type(layer).__name__}: a route per layer needs nn.Linear")
    tied = [other for other, tensor in parameters.items() if tensor is parameters[name] and other != name]
    if tied:
        raise Mistake(f"gate {name} belongs to a weight that is {tied[0]}, too, and nothing weighs the parts there")
    return layer
