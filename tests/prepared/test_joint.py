"""One model trained on all tasks: it learns their rows under the experts' heads, and leaves the bench as it was."""

import pytest
import torch

from baselines import multitask
from support.family import CLASSES, bench, opened
from twinbench.prepared import joint
from twinbench.weights.state_dict import StateDict

NUMBERS = {"split": "train", "rows": 20, "epochs": 15, "lr": 1e-2, "size": 8, "seed": 0}


def losses(own, state) -> dict[str, float]:
    """Per task the mean loss of its first training rows under a state."""
    suite, found = own.suite, {}
    for task in suite.experts:
        inputs = suite.workload.encoded(suite.tokenizer, suite.tasks[task], "train", 20)
        with own.holding(state), torch.inference_mode():
            found[task] = float(
                joint._loss(own, suite.workload.model(own, task), inputs, task, "train", list(range(20)))
            )
    return found


def test_it_learns_every_task_and_leaves_the_module_fit_for_scoring(family):
    own = bench(opened(family), 5)
    before = losses(own, own.suite.base)
    found = joint.prepare(own)(*NUMBERS.values())
    assert found.keys() == {name for name in own.suite.base if own.suite.base[name].is_floating_point()}
    after = losses(own, StateDict(own.suite.base, lambda name: found.get(name, own.suite.base[name])))
    assert all(after[task] < before[task] - 0.001 for task in CLASSES), (before, after)
    assert not own.module.training
    assert all(parameter.grad is None for parameter in own.module.parameters())
    assert all(torch.equal(found[name], again) for name, again in joint.prepare(own)(*NUMBERS.values()).items())


def test_a_seed_and_the_numbers_make_the_model(family):
    suite = opened(family)
    first, same, other = (
        joint.trained(bench(suite, 5), *(NUMBERS | {"epochs": 1, "seed": seed}).values()) for seed in (0, 0, 1)
    )
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name])


def test_an_epoch_has_every_row_once():
    batches = joint._epoch({"a": 10, "b": 3}, 4, torch.Generator().manual_seed(0))
    assert sorted(len(rows) for task, rows in batches if task == "a") == [2, 4, 4]
    assert sorted(row for task, rows in batches for row in rows if task == "a") == list(range(10))
    assert [sorted(rows) for task, rows in batches if task == "b"] == [[0, 1, 2]]
    assert [task for task, _ in batches] != sorted(task for task, _ in batches), "tasks take turns"


@pytest.mark.parametrize(
    "changes",
    [{"split": "test"}, {"rows": 0}, {"epochs": 0}, {"size": 0}, {"lr": 0.0}],
    ids=lambda each: next(iter(each)),
)
def test_hyperparameters_out_of_range_are_named(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        multitask.merge({}, {}, **NUMBERS | changes, joint=None)
