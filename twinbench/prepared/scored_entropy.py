"""``scored_entropy(state, task, rows, size, draw)``: as `entropy`, on the test's inputs.

The authors of methods that adapt to unlabelled inputs read the test's. Such a result is of a model that has seen the
test, so it is recorded as that and ranked apart.
"""

from collections.abc import Callable

from torch import Tensor

from twinbench.prepared.entropy import gradients

READS = "test inputs"
NEEDS = ("model", "batches", "log_likelihoods")
BY_CLASS = True


def prepare(bench) -> Callable[..., dict[str, Tensor]]:
    """Gradients on the test's rows: see `entropy.gradients`."""
    return gradients(bench, "test")
