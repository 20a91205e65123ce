"""AdaMerging: its coefficients' slopes are those of the entropy itself, and its steps make a model surer."""

from dataclasses import replace

import pytest
import torch

from baselines import adamerging, adamerging_tta, task_arithmetic, ties
from support.family import CLASSES, bench, opened
from support.methods import assert_same, models
from twinbench.merging.compress import generator
from twinbench.plan.signature import signature
from twinbench.prepared import entropy, scored_entropy

SETTINGS = {
    "granularity": "layer",
    "density": 1.0,
    "start": 0.3,
    "steps": 0,
    "lr": 0.05,
    "rows": 8,
    "size": 8,
    "seed": 0,
}
CLASSED = [task for task, classes in CLASSES.items() if classes]


def towards(target):
    """A stand-in whose slope is that of ``|state - target|^2 / 2``, and what it was asked for."""
    asked = []

    def slope(state, task, rows, size, draw):
        asked.append((task, rows, size, torch.rand(1, generator=draw).item()))
        return {name: state[name] - target[name] for name in target}

    return slope, asked


def test_no_step_is_task_arithmetic_and_its_plus_plus_is_ties():
    base, experts = models()
    found = adamerging.merge(base, experts, **SETTINGS, entropy=None)
    assert_same(dict(found.shared), dict(task_arithmetic.merge(base, experts, scaling=0.3).shared), 1e-6)
    found = adamerging.merge(base, experts, **SETTINGS | {"density": 0.2}, entropy=None)
    wanted = ties.merge(base, experts, density=0.2, scaling=0.3, scope="global", aggregate="sum")
    assert_same(dict(found.shared), dict(wanted.shared), 1e-6)


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_coefficients_go_where_the_loss_is_least(granularity):
    """The model aimed at is 0.8 of one task vector and 0.1 of another."""
    base, experts = models(count=2)
    first, second = (task_arithmetic.merge(base, {"a": own}, scaling=1.0).shared for own in experts.values())
    target = {name: base[name] + 0.8 * (first[name] - base[name]) + 0.1 * (second[name] - base[name]) for name in base}
    slope, asked = towards(target)
    settings = SETTINGS | {"steps": 300, "granularity": granularity}
    found = adamerging.merge(base, experts, **settings, entropy=slope).shared
    assert_same(dict(found), target, 5e-3)
    assert {(task, rows, size) for task, rows, size, _ in asked} == {(task, 8, 8) for task in experts}
    assert len({drawn for *_, drawn in asked}) == len(asked) == 600, "each step draws rows of its own"


def test_coefficients_stay_in_their_range():
    base, experts = models(count=1)
    own = experts["task0"]
    slope, _ = towards({name: base[name] + 5 * (own[name] - base[name]) for name in base})
    found = adamerging.merge(base, experts, **SETTINGS | {"steps": 100}, entropy=slope).shared
    assert_same(dict(found), own, 1e-6)


@pytest.mark.parametrize("module", [entropy, scored_entropy])
def test_the_slope_is_that_of_the_mean_entropy(family, module):
    suite = opened(family)
    own = bench(suite, 5)
    ask = module.prepare(own)
    state = dict(task_arithmetic.merge(suite.base, suite.experts, scaling=0.5).shared)
    split = "test" if module is scored_entropy else "validation"
    for task in CLASSED:
        found = ask(state, task, 5, 5, generator(0))
        assert found.keys() == set(state)
        (batch,) = suite.workload.batches(own, task, split, 5, 5)

        def value(name, shift, task=task, batch=batch):
            with own.holding(state | {name: state[name] + shift}), torch.inference_mode():
                _, logs = suite.workload.log_likelihoods(suite.workload.model(own, task), batch, suite.tasks[task])
            return float(-(logs.exp() * logs).sum(1).mean())

        for name in ("embeddings.LayerNorm.weight", "encoder.layer.1.output.dense.weight"):
            shift = 0.05 * found[name] / found[name].norm()
            slope = (value(name, shift) - value(name, -shift)) / (2 * 0.05)
            assert slope == pytest.approx(float(found[name].norm()), rel=0.02)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_slope_reads_tokens_and_no_padding(family, side):
    suite = opened(family)
    suite.tokenizer.padding_side = side
    own = bench(suite, 5)
    state, drawn = dict(suite.experts["letters"]), int(torch.randperm(5, generator=generator(4))[0])
    found = entropy.prepare(own)(state, "letters", 5, 1, generator(4))
    text = sorted(suite.tasks["letters"].splits["validation"]["text"], key=lambda text: len(text.split()))[drawn]
    with own.holding(state) as module, torch.inference_mode(False), torch.enable_grad():
        model = suite.workload.model(own, "letters")
        logs = model(**suite.tokenizer(text, return_tensors="pt")).logits.log_softmax(1)
        (-(logs.exp() * logs).sum()).backward()
        name = "encoder.layer.1.output.dense.weight"
        wanted = module.get_parameter(name).grad.clone()
        module.zero_grad()
    assert len(text.split()) < 11, "the longest has no padding"
    assert (found[name] - wanted).norm() < 1e-3 * wanted.norm()


def test_steps_make_the_merged_model_surer(family):
    suite = opened(family)
    base = {name: suite.base[name] for name in suite.base}
    farther = {t: {n: base[n] + 20 * (suite.experts[t][n] - base[n]) for n in base} for t in CLASSED}
    suite = replace(suite, experts=farther)
    own = bench(suite, 5)
    ask, sums = entropy.prepare(own), []
    for steps in (0, 20):
        settings = SETTINGS | {"steps": steps, "rows": 5, "size": 5}
        state = dict(adamerging.merge(suite.base, suite.experts, **settings, entropy=ask).shared)
        total = 0
        for task in suite.experts:
            (batch,) = suite.workload.batches(own, task, "validation", 5, 5)
            with own.holding(state), torch.inference_mode():
                _, logs = suite.workload.log_likelihoods(suite.workload.model(own, task), batch, suite.tasks[task])
            total += float(-(logs.exp() * logs).sum(1).mean())
        sums.append(total)
    assert sums[1] < sums[0] - 0.01, "these heads cannot be much surer"


def test_who_reads_the_test_says_so():
    assert signature("baselines.adamerging.merge").reads == "training inputs"
    assert signature("baselines.adamerging_tta.merge").reads == "test inputs"
    base, experts = models(count=2)
    slope, _ = towards(base)
    settings = SETTINGS | {"steps": 3}
    one = adamerging.merge(base, experts, **settings, entropy=slope).shared
    assert_same(dict(one), dict(adamerging_tta.merge(base, experts, **settings, scored_entropy=slope).shared))


@pytest.mark.parametrize(
    "changes",
    [{"granularity": "x"}, {"density": 0}, {"start": 1.1}, {"steps": -1}, {"lr": 0}, {"size": 0}, {"size": 9}],
)
def test_hyperparameters_out_of_range_are_named(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        adamerging.merge({}, {"a": {}}, **SETTINGS | changes, entropy=None)
