"""``gram(expert, rows)``: what each linear layer of an expert sees when it runs its own training rows.

``G = X^T X / tokens`` (Jin et al., arXiv 2212.09849, section 4), X being the layer's inputs, a row per token; padding
has none.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from twinbench.prepared._remembered import measured
from twinbench.system.mistakes import Mistake

READS = "training inputs"
NEEDS = ("model", "batches")


def prepare(bench) -> Callable[[str, int], Mapping[str, Tensor]]:
    """Per merged weight (d_out, d_in) of a linear layer its G (d_in, d_in), float32.

    Raises:
        ValueError: the task has fewer rows.
    """

    def gram(expert: str, rows: int) -> Mapping[str, Tensor]:
        linear = {f"{name}.weight": layer for name, layer in bench.module.named_modules() if type(layer) is nn.Linear}
        layers = {name: layer for name, layer in linear.items() if name in bench.suite.base}
        return measured(bench, expert, rows, __file__, layers, lambda: grams(bench, expert, rows, layers))

    return gram


def grams(bench, expert: str, rows: int, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Measure them, in batches."""
    workload, size = bench.suite.workload, min(bench.batch_size, rows)
    sums = {name: layer.weight.new_zeros(2 * (layer.in_features,)).float() for name, layer in layers.items()}
    counts, mask = dict.fromkeys(layers, 0), torch.zeros(0)

    def add(name: str, inputs: Tensor) -> None:
        seen = _without_padding(name, inputs, mask).float()
        sums[name].addmm_(seen.T, seen)
        counts[name] += len(seen)

    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0]))
        for name, layer in layers.items()
    ]
    try:
        with bench.holding(bench.suite.experts[expert]), torch.inference_mode():
            model, given = workload.model(bench, expert), workload.batches(bench, expert, "train", rows, size)
            for batch in tqdm(given, total=-(-rows // size), desc=f"Gram matrices of {expert}", leave=False):
                mask = batch["attention_mask"].bool()
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / max(1, counts[name])).cpu() for name, total in sums.items()}


def _without_padding(name: str, inputs: Tensor, mask: Tensor) -> Tensor:
    """The inputs of a layer, a row per token (or per text, above a pooler)."""
    rows = inputs.flatten(0, -2)
    if len(rows) == mask.numel():
        return rows[mask.flatten()]
    if len(rows) == len(mask):
        return rows
    raise Mistake(f"gram: {name} sees {len(rows)} rows of {tuple(mask.shape)} tokens, of which padding is not known")
