"""``fisher(expert, rows)``: the diagonal of an expert's Fisher information on its own training rows.

``F = 1/n sum_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2`` (Matena and Raffel, arXiv 2111.09832, Eq. 3), with the
expectation in full and each row's gradient squared by itself. Labels are not read.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from twinbench.prepared._remembered import measured

READS = "training inputs"
NEEDS = ("model", "batches", "log_likelihoods")


def prepare(bench) -> Callable[[str, int], Mapping[str, Tensor]]:
    """Per merged tensor of an expert its Fisher information, float32, in the tensor's shape.

    Raises:
        ValueError: the task has fewer rows.
    """

    def fisher(expert: str, rows: int) -> Mapping[str, Tensor]:
        names = [name for name, _ in bench.module.named_parameters() if name in bench.suite.base]
        return measured(bench, expert, rows, __file__, names, lambda: diagonal(bench, expert, rows, names))

    return fisher


def diagonal(bench, expert: str, rows: int, names: list[str]) -> dict[str, Tensor]:
    """Measure it: one forward pass a row, without padding, and one backward pass for each label that it may get."""
    suite, workload = bench.suite, bench.suite.workload
    parameters = {name: bench.module.get_parameter(name) for name in names}
    totals = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    share = 0.0

    def add(name: str, gradient: Tensor) -> None:
        _add_square(totals[name], gradient, share)

    with bench.holding(suite.experts[expert]) as module, _sparse(module), _gradients(parameters, add):
        model, given = workload.model(bench, expert), workload.batches(bench, expert, "train", rows, 1)
        for batch in tqdm(given, total=rows, desc=f"Fisher information of {expert}", unit="row", leave=False):
            weights, values = workload.log_likelihoods(model, batch, suite.tasks[expert])
            for weight, value in zip(weights[0].tolist(), values[0], strict=True):
                share = weight / rows
                value.backward(retain_graph=True, inputs=list(parameters.values()))
    return {name: total.cpu() for name, total in totals.items()}


def _add_square(total: Tensor, gradient: Tensor, share: float) -> None:
    if gradient.is_sparse:
        rows = gradient.coalesce()
        total.index_add_(0, rows.indices()[0], rows.values().float().square(), alpha=share)
    else:
        total.addcmul_(gradient.float(), gradient.float(), value=share)


@contextmanager
def _gradients(parameters: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Give away each gradient of a backward pass as soon as it is there: it is still in the processor's cache."""

    def given(name: str, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        take(name, gradient)

    hooks = [
        parameter.register_post_accumulate_grad_hook(partial(given, name)) for name, parameter in parameters.items()
    ]
    try:
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _sparse(module: nn.Module) -> Iterator[None]:
    """Let embeddings have gradients of the rows that are used alone; zeros for the others cost as much as layers."""
    dense = [child for child in module.modules() if isinstance(child, nn.Embedding) and not child.sparse]
    for child in dense:
        child.sparse = True
    try:
        yield
    finally:
        for child in dense:
            child.sparse = False
