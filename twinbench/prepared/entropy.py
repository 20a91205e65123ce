"""``entropy(state, task, rows, size, draw)``: which way a merged model's predictions on a task become surer.

The gradient, by the merged tensors, of the mean entropy of the predictions ``H = -sum_y p(y|x) log p(y|x)`` on inputs
that no expert was trained on: those held out of the training data. Labels are not read. A regression has no entropy:
a suite with one is refused.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from twinbench.prepared.prefix_gram import whole

READS = "training inputs"
NEEDS = ("model", "batches", "log_likelihoods")
BY_CLASS = True


def prepare(bench) -> Callable[..., dict[str, Tensor]]:
    """Gradients on held-out rows: see `gradients`."""
    return gradients(bench, "validation")


def gradients(bench, split: str) -> Callable[..., dict[str, Tensor]]:
    """A function of a merged state, a task, how many rows there are to draw from, how many to draw, and a generator.

    It gives the gradient of the mean entropy of the drawn rows by each merged tensor, float32, on the CPU. The module
    holds the state afterwards.

    Raises:
        ValueError: the task has fewer rows.
    """
    pools: dict[tuple[str, int], dict[str, Tensor]] = {}

    def entropy(state: Mapping[str, Tensor], task: str, rows: int, size: int, draw: torch.Generator) -> dict:
        suite, workload = bench.suite, bench.suite.workload
        if (task, rows) not in pools:
            (pools[task, rows],) = workload.batches(bench, task, split, rows, rows)
        chosen = torch.randperm(rows, generator=draw)[:size]
        batch = {name: tensor[chosen] for name, tensor in pools[task, rows].items()}
        seen = batch["attention_mask"].bool().any(0)  # padding may be on either side
        batch = {name: tensor[:, seen] for name, tensor in batch.items()}
        with bench.holding(whole(bench, state, task)) as module, torch.inference_mode(False), torch.enable_grad():
            parameters = {name: parameter for name, parameter in module.named_parameters() if name in state}
            _, values = workload.log_likelihoods(workload.model(bench, task), batch, suite.tasks[task])
            loss = -(values.exp() * values).sum(1).mean()
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(state[name]) if gradient is None else gradient.float().cpu()
            for name, gradient in zip(parameters, found, strict=True)
        }

    return entropy
