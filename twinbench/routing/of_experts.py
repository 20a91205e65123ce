"""What a router can ask of the experts about a row, so that no rows train it. The expert with the least answer gets it.

- ``residuals``: how much of a row lies beyond an expert's directions. With x the mean over the row's tokens of what the
  first linear layer of a block reads, and V the right singular vectors that the merge keeps of an expert's change of
  that layer, ``r_e(x) = || x - V_e V_e^T x ||_2``. Later blocks do not run. "MASS: MoErging through Adaptive Subspace
  Selection", Crisostomi et al., 2025, arXiv 2504.05342.
- ``entropies``: how unsure a whole expert is, under the head of the known task: ``H_e(x) = -sum_y p_e(y|x) log
  p_e(y|x)``. Every expert runs on every row. "DaWin: Training-free Dynamic Weight Interpolation for Robust Adaptation",
  Oh et al., ICLR 2025, arXiv 2410.03782.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from twinbench.merging.merged import Parts
from twinbench.routing.features import first_layers, in_batches, layers_of
from twinbench.system.mistakes import Mistake
from twinbench.weights.parts import LowRank
from twinbench.workbench import Workbench


@torch.inference_mode()
def residuals(
    bench: Workbench, exclusive: Mapping[str, Parts], task: str, split: str, *, layer: int | None, rows: int | None
) -> Tensor:
    """How much of each row lies beyond each expert's directions, in the base.

    Args:
        exclusive: per expert its parts, whose directions are asked.
        layer: of the block whose first linear layer is read, counted from 0; None is the last.
        rows: the first so many of the split; None is all.

    Returns:
        (n, experts), float32 on the CPU.

    Raises:
        ValueError: there is no such block, or an expert's part of that layer is not low-rank.
    """
    module, count = bench.module, len(bench.suite.tasks[task].splits[split])
    place = blocks_before(module, layer)
    own = set(layers_of(module)[2][place].modules())
    first: list[tuple[str, Tensor]] = []  # the block's first linear layer, and what it reads
    bases: list[Tensor] = []

    def watched(name: str):
        return lambda _, given: None if first else first.append((name, given[0]))

    def distances(batch: dict, _) -> Tensor:
        first.clear()
        module.base_model(**batch)
        ((name, tokens),) = first
        if not bases:
            bases.extend(_directions(exclusive, name, tokens.shape[-1], tokens.device))
        mask = batch["attention_mask"][..., None].to(tokens.device).float()
        x = (tokens.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.stack([(x - x @ basis @ basis.T).norm(dim=1) for basis in bases], 1)

    linear = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear) and part in own}
    hooks = [part.register_forward_pre_hook(watched(f"{name}.weight")) for name, part in linear.items()]
    chosen = list(range(count))[:rows]
    held = bench.holding(None if bench.suite.factored else dict(bench.suite.base.items()))
    try:
        with held, first_layers(module, place + 1):
            return in_batches(bench, distances, task, split, chosen)
    finally:
        for hook in hooks:
            hook.remove()


def blocks_before(module: nn.Module, layer: int | None) -> int:
    """How many blocks run before the one whose input is read.

    Raises:
        ValueError: there is no such block.
    """
    count = len(layers_of(module)[2])
    if layer is not None and not 0 <= layer < count:
        raise Mistake(f"router.features.layer must be in [0, {count - 1}] or null, got {layer}")
    return count - 1 if layer is None else layer


@torch.inference_mode()
def entropies(bench: Workbench, task: str, split: str, *, rows: int | None) -> Tensor:
    """How unsure each expert's prediction is under the head of the task, which has classes, in nats.

    Args:
        rows: the first so many of the split; None is all.

    Returns:
        (n, experts), float32 on the CPU.
    """
    suite, spec, found = bench.suite, bench.suite.tasks[task], []
    count = len(spec.splits[split])
    chosen = list(range(count))[:rows]
    for expert in suite.experts.values():
        with bench.holding(dict(expert.items())):
            model = suite.workload.model(bench, task)

            def unsure(batch: dict, _, model: nn.Module = model) -> Tensor:
                _, values = suite.workload.log_likelihoods(model, batch, spec)
                return -(values.exp() * values).sum(1, keepdim=True)

            found.append(in_batches(bench, unsure, task, split, chosen))
    return torch.cat(found, 1)


def _directions(exclusive: Mapping[str, Parts], name: str, width: int, device: torch.device) -> list[Tensor]:
    """Per expert an orthonormal basis (width, k) of what its part of a matrix reads; of no part an empty one."""
    found = []
    for expert, parts in exclusive.items():
        part = parts.get(name, LowRank(torch.empty(0, 0), torch.empty(0, width)))
        if not isinstance(part, LowRank):
            said = f"router.features.source=residuals reads low-rank parts, and {expert}'s of {name} is not"
            raise Mistake(f"{said}: use method=mass, or method=twin_merging with method.compression=svd")
        found.append(torch.linalg.qr(part.right.float().T)[0].to(device))
    if not any(basis.numel() for basis in found):
        raise Mistake(f"router.features.source=residuals: no expert has a part of {name}; choose another layer")
    return found
