"""``means(expert, rows)``: what each linear layer of an expert sees of a text on average, on its own training rows.

The mean over texts of the mean over a text's tokens of the layer's inputs; padding has none. Routers that compare a
layer's input with a prototype of each task read it (ESM++).
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
    """Per merged weight (d_out, d_in) of a linear layer the mean (d_in,), float32.

    Raises:
        ValueError: the task has fewer rows.
    """

    def means(expert: str, rows: int) -> Mapping[str, Tensor]:
        linear = {f"{name}.weight": layer for name, layer in bench.module.named_modules() if type(layer) is nn.Linear}
        layers = {name: layer for name, layer in linear.items() if name in bench.suite.base}
        return measured(bench, expert, rows, __file__, layers, lambda: mean_inputs(bench, expert, rows, layers))

    return means


def mean_inputs(bench, expert: str, rows: int, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Measure them, in batches."""
    workload, size = bench.suite.workload, min(bench.batch_size, rows)
    sums = {name: layer.weight.new_zeros(layer.in_features).float() for name, layer in layers.items()}
    mask = torch.zeros(0)

    def add(name: str, inputs: Tensor) -> None:
        # Not `merging.gates.text_means`: the key of what is remembered has this file's code.
        if inputs.shape[:2] != mask.shape:
            raise Mistake(f"means: {name} sees {tuple(inputs.shape)} of {tuple(mask.shape)} texts and tokens")
        kept = mask.to(torch.float32)[..., None]
        sums[name] += ((inputs.float() * kept).sum(1) / kept.sum(1)).sum(0)

    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0]))
        for name, layer in layers.items()
    ]
    try:
        with bench.holding(bench.suite.experts[expert]), torch.inference_mode():
            model, given = workload.model(bench, expert), workload.batches(bench, expert, "train", rows, size)
            for batch in tqdm(given, total=-(-rows // size), desc=f"Mean inputs of {expert}", leave=False):
                mask = batch["attention_mask"].bool()
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / rows).cpu() for name, total in sums.items()}
