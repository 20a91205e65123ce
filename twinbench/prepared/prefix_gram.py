"""``prefix_gram(state, expert, rows, names)``: what some linear layers see under any weights, on an expert's rows.

``G = X^T X / tokens`` as in `gram`, but X are the inputs of the layers ``names`` when the model holds ``state``, say a
merged model up to a block and the expert from there on. The forward pass ends at the last of these layers.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn
from tqdm import tqdm

from twinbench.prepared.gram import _without_padding

READS = "training inputs"
NEEDS = ("model", "batches")


class _Enough(Exception):
    """All layers that are asked for have been called."""


def prepare(bench) -> Callable[[Mapping[str, Tensor], str, int, Collection[str]], dict[str, Tensor]]:
    """Per weight (d_out, d_in) in ``names`` of an `nn.Linear` its G (d_in, d_in), float32; other weights have none.

    Raises:
        ValueError: the task has fewer rows.
    """

    def prefix_gram(state: Mapping[str, Tensor], expert: str, rows: int, names: Collection[str]) -> dict[str, Tensor]:
        layers = {name: bench.module.get_submodule(name.removesuffix(".weight")) for name in names}
        layers = {name: layer for name, layer in layers.items() if type(layer) is nn.Linear}
        if not layers:
            return {}
        sums = {name: layer.weight.new_zeros(2 * (layer.in_features,)).float() for name, layer in layers.items()}
        counts, mask, waiting = dict.fromkeys(layers, 0), torch.zeros(0), set()

        def add(name: str, inputs: Tensor) -> None:
            seen = _without_padding(name, inputs, mask).float()
            sums[name].addmm_(seen.T, seen)
            counts[name] += len(seen)
            waiting.discard(name)
            if not waiting:
                raise _Enough

        hooks = [
            layer.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0]))
            for name, layer in layers.items()
        ]
        workload, size = bench.suite.workload, min(bench.batch_size, rows)
        try:
            with bench.holding(whole(bench, state, expert)), torch.inference_mode():
                model, given = workload.model(bench, expert), workload.batches(bench, expert, "train", rows, size)
                for batch in tqdm(given, total=-(-rows // size), desc=f"Gram matrices of {expert}", leave=False):
                    mask, waiting = batch["attention_mask"].bool(), set(layers)
                    with suppress(_Enough):
                        model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: (total / max(1, counts[name])).cpu() for name, total in sums.items()}

    return prefix_gram


def whole(bench, state: Mapping[str, Tensor], expert: str) -> dict[str, Tensor]:
    """A state with an expert's own tensors where nothing is merged: biases under ``protocol=paper``."""
    own = bench.suite.experts[expert]
    return {**{name: own[name] for name in own if name not in state}, **state}
