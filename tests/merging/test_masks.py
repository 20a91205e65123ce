"""EMR and TALL-masks against their equations on dense vectors, their limits, and one bit a weight and task."""

import pytest
import torch

from baselines import emr, tall_masks
from support.methods import models
from twinbench.merging.merged import (
    exclusive_bytes,
    exclusive_kind,
    materialize,
    shared_bytes,
    stored_bytes,
    with_route,
)
from twinbench.weights.parts import Masked, dense

CASES = [(emr, {"reduce": "tensor_mean"}), (emr, {"reduce": "sum"}), (tall_masks, {"threshold": 0.4})]


def one_hot(merged, task):
    return with_route(merged, [float(task == other) for other in merged.exclusive])


def slow_emr(base, experts, reduce):
    """Per task the dense difference, by loops over single weights."""
    found = {task: {} for task in experts}
    sizes = {task: [0.0, 0.0] for task in experts}
    for name, origin in base.items():
        if not origin.is_floating_point():
            continue
        vectors = {task: (expert[name].double() - origin.double()).flatten() for task, expert in experts.items()}
        elected = torch.zeros(origin.numel(), dtype=torch.double)
        for at in range(origin.numel()):
            given = [vector[at].item() for vector in vectors.values()]
            sign = 1 if sum(given) > 0 else -1
            elected[at] = sign * max([abs(value) for value in given if value * sign > 0], default=0.0)
        for task, vector in vectors.items():
            masked = torch.tensor([e if v * e > 0 else 0.0 for v, e in zip(vector, elected, strict=True)])
            found[task][name] = masked.view(origin.shape)
            share = origin.numel() if reduce == "tensor_mean" else 1
            sizes[task][0] += vector.abs().sum().item() / share
            sizes[task][1] += masked.abs().sum().item() / share
    return {t: {name: d * sizes[t][0] / sizes[t][1] for name, d in own.items()} for t, own in found.items()}


def slow_tall(base, experts, threshold):
    found = {task: {} for task in experts}
    for name, origin in base.items():
        if origin.is_floating_point():
            vectors = {task: expert[name].double() - origin.double() for task, expert in experts.items()}
            for task, vector in vectors.items():
                others = sum(v for other, v in vectors.items() if other != task)
                kept = vector.abs() > threshold * others.abs()
                found[task][name] = torch.where(kept, vector + others, 0)
    return found


@pytest.mark.parametrize(("method", "numbers"), CASES, ids=lambda case: str(case)[:40])
def test_parts_are_those_of_the_equations(method, numbers):
    base, experts = models()
    merged = materialize(method.merge(base, experts, **numbers))
    slow = slow_emr if method is emr else slow_tall
    for task, parts in slow(base, experts, *numbers.values()).items():
        for name, wanted in parts.items():
            found = dense(merged.exclusive[task][name]) if name in merged.exclusive[task] else torch.zeros_like(wanted)
            torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "numbers"), CASES, ids=lambda case: str(case)[:40])
def test_one_expert_is_kept_exactly(method, numbers):
    base, experts = models()
    task, expert = next(iter(experts.items()))
    merged = materialize(method.merge(base, {task: expert}, **numbers))
    for name, tensor in one_hot(merged, task).items():
        torch.testing.assert_close(tensor, expert[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("method", "numbers"), CASES, ids=lambda case: str(case)[:40])
def test_a_task_costs_one_bit_a_weight_and_the_common_vector_is_there_once(method, numbers):
    base, experts = models()
    merged = materialize(method.merge(base, experts, **numbers))
    assert exclusive_kind(merged) == "mask"
    assert shared_bytes(merged) == stored_bytes(merged.shared) + stored_bytes(merged.common)
    for parts in merged.exclusive.values():
        for name, part in parts.items():
            assert isinstance(part, Masked) and len(part.bits) == -(-base[name].numel() // 8)
            assert part.of.data_ptr() == merged.common[name].data_ptr(), "all parts hold one tensor"
    tensors = {
        f"{name}.{suffix}": tensor
        for name, part in next(iter(merged.exclusive.values())).items()
        for suffix, tensor in part.stored().items()
    }
    assert exclusive_bytes(merged) == pytest.approx(len(experts) * stored_bytes(tensors), rel=0.02)


def test_a_larger_threshold_keeps_less():
    base, experts = models()
    counts = []
    for threshold in (0.0, 0.4, 1.0, 1e9):
        parts = tall_masks.merge(base, experts, threshold=threshold).exclusive
        counts.append(sum((dense(part) != 0).sum().item() for own in parts.values() for part in own.values()))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[1] > counts[2]


def test_an_expert_that_is_the_base_gets_nothing():
    base, experts = models()
    experts["still"] = dict(base)
    merged = emr.merge(base, experts, reduce="sum")
    assert not any(dense(part).any() for part in merged.exclusive["still"].values())


@pytest.mark.parametrize(
    ("method", "numbers", "words"),
    [(emr, {"reduce": "median"}, "tensor_mean, sum"), (tall_masks, {"threshold": -0.1}, "at least 0, got -0.1")],
)
def test_numbers_out_of_range(method, numbers, words):
    with pytest.raises(ValueError, match=words):
        method.merge({}, {"a": {}}, **numbers)


def test_emr_elects_minus_where_the_signs_balance():
    base = {"w": torch.zeros(2)}
    experts = {"up": {"w": torch.tensor([1.0, 3.0])}, "down": {"w": torch.tensor([-1.0, -1.0])}}
    merged = materialize(emr.merge(base, experts, reduce="sum"))
    assert merged.common["w"].tolist() == [-1, 3]
    assert dense(merged.exclusive["up"]["w"])[0] == 0 and dense(merged.exclusive["down"]["w"])[1] == 0


@pytest.mark.parametrize(("method", "numbers"), CASES, ids=lambda case: str(case)[:40])
def test_whole_numbers_stay_the_bases_and_have_no_mask(method, numbers):
    base, experts = models()
    states = [base, *experts.values()]
    for number, state in enumerate(states):
        state["position_ids"] = torch.arange(3) + number
    merged = materialize(method.merge(base, experts, **numbers))
    assert torch.equal(merged.shared["position_ids"], base["position_ids"])
    assert all("position_ids" not in parts for parts in [merged.common, *merged.exclusive.values()])
