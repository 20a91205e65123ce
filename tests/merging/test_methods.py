"""Every method file found keeps the contract, and meets the limit cases that its equation implies."""

import importlib
import inspect
import math

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from baselines import average, dare, dare_ties, expert, individual, task_arithmetic, ties
from support.commands import ROOT
from support.methods import YAMLS, assert_same, call, models
from twinbench.merging import twin_merging
from twinbench.merging.compress import basis, generator
from twinbench.merging.merged import Merged, exclusive_bytes, exclusive_kind, materialize, shared_bytes, with_route
from twinbench.plan.signature import PREPARED, hyperparameters, signature
from twinbench.weights.parts import dense, stored
from twinbench.weights.state_dict import PIECE, StateDict


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_contract(path):
    leaf = OmegaConf.load(path)
    module, _, function = leaf["_target_"].rpartition(".")
    assert module.rpartition(".")[2] == path.stem, "a method's YAML has the stem of its module"
    merge = getattr(importlib.import_module(module), function)
    parameters = inspect.signature(merge).parameters
    keywords = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert list(parameters)[:2] == ["base", "experts"]
    assert all(parameters[name].default is inspect.Parameter.empty for name in keywords), "numbers live in the YAML"
    assert keywords - PREPARED == hyperparameters(OmegaConf.to_container(leaf)).keys()
    assert signature(leaf["_target_"]).arguments == keywords, "read from source as Python reads it"
    assert signature(leaf["_target_"]).route == getattr(importlib.import_module(module), "ROUTE", None)
    assert "arXiv" in inspect.unwrap(merge).__globals__["__doc__"] or path.stem in (
        "pretrained",
        "individual",
        "expert",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_merge_keeps_layout_and_inputs_and_repeats_itself(path, dtype):
    base, experts = models(dtype=dtype)
    before = (
        {n: t.clone() for n, t in base.items()},
        {k: {n: t.clone() for n, t in e.items()} for k, e in experts.items()},
    )
    merged = materialize(call(path, base, experts))
    assert_same(base, before[0])
    for task in experts:
        assert_same(experts[task], before[1][task])
    assert list(merged.shared) == list(base)
    assert {n: (t.shape, t.dtype) for n, t in merged.shared.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    assert set(merged.exclusive) <= set(experts)
    for parts in merged.exclusive.values():
        for name, part in parts.items():
            assert dense(part).shape == base[name].shape
    for name, gate in merged.gates.items():
        found = gate.weights(torch.ones(2, 3, base[name].shape[1]))
        assert found.shape == (2, 3, len(experts))
    again = materialize(call(path, base, experts))
    assert_same(merged.shared, again.shared)
    for task, parts in merged.exclusive.items():
        assert_same({n: dense(p) for n, p in parts.items()}, {n: dense(p) for n, p in again.exclusive[task].items()})
    assert merged.gates.keys() == again.gates.keys()
    for name, gate in merged.gates.items():
        assert_same(gate.stored(), again.gates[name].stored())


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_merge_of_models_without_tensors_is_empty(path):
    merged = materialize(call(path, {}, {"task0": {}, "task1": {}}))
    assert merged.shared == {}
    assert not any(merged.exclusive.values())


@pytest.mark.parametrize(
    ("stem", "changes", "word"),
    [
        ("ties", {"density": 0.0}, "density"),
        ("ties", {"density": 1.5}, "density"),
        ("ties", {"scope": "layer"}, "scope"),
        ("ties", {"aggregate": "median"}, "aggregate"),
        ("task_arithmetic", {"scaling": float("nan")}, "scaling"),
        ("ties", {"scaling": float("inf")}, "scaling"),
        ("dare", {"scaling": float("nan")}, "scaling"),
        ("dare", {"density": 0}, "density"),
        ("dare", {"density": 1.01}, "density"),
        ("dare_ties", {"keep": 0}, "keep"),
        ("dare_ties", {"keep": 1.01}, "keep"),
        ("expert", {"task": "task7"}, "did you mean 'task"),
        ("twin_merging", {"compression": "svdd"}, "compression"),
        ("twin_merging", {"rank_ratio": 1.01}, "rank_ratio"),
        ("twin_merging", {"rank_ratio": 0.0}, "rank_ratio"),
        ("twin_merging", {"density": 0.1}, "density"),
        ("twin_merging", {"compression": "magnitude"}, "density"),
        ("smile", {"rank": 0}, "rank must be at least 1, got 0"),
        ("smile", {"gate_rank": 0}, "gate_rank must be at least 1, got 0"),
        ("smile", {"top_k": 0}, "top_k must be at least 1 and at most 2, got 0"),
        ("smile", {"top_k": 3}, "top_k must be at least 1 and at most 2, got 3"),
    ],
)
def test_hyperparameters_out_of_range_are_named_before_any_tensor_is_read(stem, changes, word):
    with pytest.raises(ValueError, match=word):
        call(ROOT / "conf" / "method" / f"{stem}.yaml", {}, {"task0": {}, "task1": {}}, **changes)


def test_average_of_identical_experts_is_the_expert():
    base, experts = models(count=1)
    same = {f"copy{i}": experts["task0"] for i in range(4)}
    assert_same(materialize(average.merge(base, same)).shared, experts["task0"], 1e-7)


def test_task_arithmetic_limits():
    base, experts = models()
    assert_same(dict(task_arithmetic.merge(base, experts, scaling=0.0).shared), base)
    one = {"task0": experts["task0"]}
    assert_same(dict(task_arithmetic.merge(base, one, scaling=1.0).shared), experts["task0"], 5e-7)  # 1 ulp at 4
    assert_same(
        dict(task_arithmetic.merge(base, experts, scaling=1 / 3).shared),
        dict(average.merge(base, experts).shared),
        1e-6,
    )


def test_ties_at_full_density_with_one_expert_is_task_arithmetic():
    base, experts = models(count=1)
    for scope in ("global", "tensor"):
        for aggregate in ("mean", "sum"):
            merged = ties.merge(base, experts, density=1.0, scaling=0.7, scope=scope, aggregate=aggregate)
            assert_same(dict(merged.shared), dict(task_arithmetic.merge(base, experts, scaling=0.7).shared), 1e-6)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.77])
def test_ties_equals_a_slow_reference(scope, aggregate, density):
    base, experts = models(seed=3)
    flat = {task: torch.cat([(e[n] - base[n]).flatten() for n in base]) for task, e in experts.items()}
    sizes = [base[n].numel() for n in base]
    trimmed = []
    for vector in flat.values():
        pieces = [vector] if scope == "global" else list(vector.split(sizes))
        for piece in pieces:
            order = piece.abs().sort(descending=True).indices
            piece[order[max(1, round(density * len(piece))) :]] = 0.0
        trimmed.append(torch.cat(pieces))
    expected = torch.zeros(sum(sizes))
    for i in range(len(expected)):
        values = [float(vector[i]) for vector in trimmed]
        sign = (sum(values) > 0) - (sum(values) < 0)
        agreeing = [v for v in values if v * sign > 0]
        expected[i] = sum(agreeing) / (max(1, len(agreeing)) if aggregate == "mean" else 1)
    merged = ties.merge(base, experts, density=density, scaling=1.0, scope=scope, aggregate=aggregate).shared
    got = torch.cat([(merged[n] - base[n]).flatten() for n in base])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_a_threshold_is_looked_for_around_its_guess():
    """Five standard errors, sqrt(1000 * 0.2 * 0.8) = 12.65 ranks each, and two more; outside the sample is nothing."""
    sample = torch.arange(1000.0)
    assert ties._bracket(sample, 0.2, 5.0) == (pytest.approx(734, abs=1e-3), 866)
    assert ties._bracket(sample, 0.2, 5.0)[0] < 734, "just below, so what equals the guess is inside"
    assert ties._bracket(sample[:10] + 1, 0.75, 0.0) == (pytest.approx(1), 6)
    assert ties._bracket(sample[:10] + 1, 0.25, 0.0) == (pytest.approx(6), math.inf)
    assert ties._bracket(sample, 0.9999, 5.0) == (0, 4)
    assert ties._bracket(sample, 0.2, math.inf) == ties._bracket(sample[:1], 0.2, 5.0) == (0, math.inf)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 1.0])
def test_threshold_is_the_exact_order_statistic(density):
    values = torch.cat(
        [torch.randn(5000, generator=torch.Generator().manual_seed(1)), torch.zeros(3000), torch.ones(40)]
    )
    k = max(1, round(density * len(values)))
    assert (
        ties.kept_above({"a": values[:4000], "b": values[4000:]}, density)
        == values.abs().sort(descending=True).values[k - 1]
    )


def test_a_sample_that_misleads_costs_time_and_not_the_threshold(monkeypatch):
    """It sees zeros alone, so the first brackets end below the threshold."""
    monkeypatch.setattr(ties, "SAMPLE", 10)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)).abs() + 1
    pieces = {"v": values[:450], "w": values[450:]}
    assert torch.equal(ties._sample(pieces, None, ["v", "w"], 1000), values[::101].sort().values)
    moved = {name: 3 - tensor for name, tensor in pieces.items()}
    origin = {name: torch.full_like(tensor, 3) for name, tensor in pieces.items()}
    torch.testing.assert_close(ties._sample(moved, origin, ["v", "w"], 1000), values[::101].sort().values)
    values[::101] = 0
    assert ties.kept_above({"w": values}, 0.3) == values.sort(descending=True).values[299]
    assert ties.kept_above({"w": values}, 0.99) == values.sort(descending=True).values[989], "the last that is not zero"
    assert ties.kept_above({"w": values}, 0.995) == ties.kept_above({}, 0.3) == 0, "fewer are not zero"


def test_a_sample_spares_the_threshold_most_of_the_weights():
    """After the sizes and the sample one more reading finds it, and only a few weights need sorting."""
    read, values = [], torch.randn(2, 2**19, generator=torch.Generator().manual_seed(0))
    vector = StateDict(["0", "1"], lambda name: read.append(name) or values[int(name)])
    threshold = ties.kept_above(vector, 0.2)
    assert threshold == values.abs().flatten().kthvalue(values.numel() - round(0.2 * values.numel()) + 1).values
    assert read == ["0", "1"] * 3
    low, high = ties._bracket(values[0].abs().sort().values, 0.2, 5.0)
    assert low < threshold <= high
    assert ((values.abs() > low) & (values.abs() <= high)).float().mean() < 0.02


def test_dare_limits_and_unbiasedness():
    base, experts = models()
    assert_same(
        dict(dare.merge(base, experts, density=1.0, scaling=0.3, seed=0).shared),
        dict(task_arithmetic.merge(base, experts, scaling=0.3).shared),
        1e-6,
    )
    settings = {"density": 0.4, "scaling": 1.0, "scope": "global", "aggregate": "mean"}
    assert_same(
        dict(dare_ties.merge(base, experts, keep=1.0, seed=0, **settings).shared),
        dict(ties.merge(base, experts, **settings).shared),
        1e-6,
    )
    full = task_arithmetic.merge(base, experts, scaling=1.0).shared["embed.weight"]
    draws = [dare.merge(base, experts, density=0.5, scaling=1.0, seed=s).shared["embed.weight"] for s in range(300)]
    assert not torch.equal(draws[0], draws[1])
    assert (torch.stack(draws).mean(0) - full).abs().max() < 0.1  # 300 draws of +-0.17: 5 sigma


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_dare_is_its_masks_written_out_whatever_the_pieces(scope):
    """One mask per task and tensor, the same for the thresholds of TIES as for what is merged; positions stay."""
    shapes = {"large": (PIECE + 5,), "small": (3, 4)}
    draw = lambda: {name: torch.randn(shape) for name, shape in shapes.items()}  # noqa: E731
    torch.manual_seed(0)
    base, positions = draw(), {"positions": torch.arange(4)}
    experts = {task: {n: base[n] + 0.1 * t for n, t in draw().items()} for task in "ab"}
    thinned = {
        task: {
            name: base[name]
            + (torch.rand(tensor.numel(), generator=generator(3, task, name)) < 0.6).view(tensor.shape)
            * (tensor - base[name])
            / 0.6
            for name, tensor in state.items()
        }
        for task, state in experts.items()
    }
    merged = dare.merge(
        base | positions, {t: e | positions for t, e in experts.items()}, density=0.6, scaling=0.3, seed=3
    )
    wanted = {name: base[name] + 0.3 * sum(e[name] - base[name] for e in thinned.values()) for name in base}
    assert_same(dict(merged.shared), wanted | positions, 1e-5)
    settings = {"density": 0.4, "scaling": 0.7, "scope": scope, "aggregate": "sum"}
    whole = {t: e | {"positions": torch.arange(4) + 1} for t, e in experts.items()}
    merged = dare_ties.merge(base | positions, whole, keep=0.6, seed=3, **settings)
    assert_same(dict(merged.shared), dict(ties.merge(base, thinned, **settings).shared) | positions, 1e-5)


def test_individual_and_expert_are_the_experts():
    base, experts = models()
    merged = individual.merge(base, experts)
    for position, task in enumerate(experts):
        hot = [float(i == position) for i in range(len(experts))]
        assert_same(with_route(merged, hot), experts[task], 1e-6)
        assert_same(dict(expert.merge(base, experts, task=task).shared), experts[task])


@pytest.mark.parametrize(
    "settings", [("svd", 1.0, None), ("none", None, None), ("magnitude", None, 1.0), ("bernoulli", None, 1.0)]
)
def test_twin_merging_that_compresses_nothing_is_the_expert(settings):
    base, experts = models()
    shared = dict(task_arithmetic.merge(base, experts, scaling=0.3).shared)
    compression, rank_ratio, density = settings
    merged = twin_merging.merge(
        base,
        experts,
        shared=shared,
        compression=compression,
        rank_ratio=rank_ratio,
        density=density,
        seed=0,
        basis=basis,
    )
    for position, task in enumerate(experts):
        hot = [float(i == position) for i in range(len(experts))]
        assert_same(with_route(merged, hot), experts[task], 1e-5)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"rank_ratio": 0.5}, "low-rank + dense vectors"),
        ({"compression": "magnitude", "rank_ratio": None, "density": 0.1}, "sparse + dense vectors"),
        ({"compression": "none", "rank_ratio": None}, "dense"),
    ],
)
def test_exclusive_parts_are_counted_and_named_as_they_would_be_written(tmp_path, settings, kind):
    base, experts = models()
    experts["task2"] |= {"up.weight": base["up.weight"]}  # a part that is zero takes no space
    parts = materialize(call(ROOT / "conf" / "method" / "twin_merging.yaml", base, experts, **settings))
    size = 0
    for task, own in parts.exclusive.items():
        assert ("up.weight" in own) == (task != "task2")
        file = tmp_path / f"{task}.safetensors"
        save_file({f"{name}.{k}": t for name, part in own.items() for k, t in stored(part).items()}, file)
        size += file.stat().st_size
    assert exclusive_bytes(parts) == size
    assert exclusive_kind(parts) == kind
    matrices = {t: {n: part for n, part in own.items() if base[n].dim() > 1} for t, own in parts.exclusive.items()}
    assert exclusive_kind(Merged(base, matrices)) == kind.partition(" + ")[0]
    vectors = {t: {n: part for n, part in own.items() if base[n].dim() < 2} for t, own in parts.exclusive.items()}
    assert exclusive_kind(Merged(base, vectors)) == "dense"
    beside = {"task0": parts.exclusive["task0"] | {"more": base["up.weight"]}}
    assert exclusive_kind(Merged(base, beside)) == kind.replace(" vectors", "")
    save_file(base, tmp_path / "base.safetensors")
    assert shared_bytes(parts) == (tmp_path / "base.safetensors").stat().st_size
    for nothing in ({}, {"task0": {}}):
        assert (exclusive_bytes(Merged(base)), exclusive_kind(Merged(base, nothing))) == (0, "none")


def test_twin_merging_ranks():
    base, experts = models()
    settings = {"shared": base, "compression": "svd", "density": None, "seed": 0, "basis": basis}
    merged = twin_merging.merge(base, experts, rank_ratio=0.5, **settings)
    parts = materialize(merged).exclusive["task0"]
    assert parts["embed.weight"].left.shape == (30, 4)
    assert parts["down.weight"].right.shape == (4, 12)
    smallest = twin_merging.merge(base, experts, rank_ratio=0.01, **settings)
    assert smallest.exclusive["task0"]["up.weight"].left.shape[1] == 1
    assert_same({"b": parts["up.bias"]}, {"b": experts["task0"]["up.bias"] - base["up.bias"]})


@pytest.mark.parametrize(("shape", "rank"), [((16, 40), 1), ((768, 16), 1), ((800, 768), 76), ((3, 40, 16), 1)])
def test_a_rank_is_rounded_down(shape, rank):
    experts = {"a": {"w": torch.randn(shape)}}
    settings = {"shared": {"w": torch.zeros(shape)}, "compression": "svd", "density": None, "seed": 0}
    identity = lambda matrix: torch.eye(min(matrix.shape))  # noqa: E731
    merged = twin_merging.merge(experts["a"], experts, rank_ratio=0.1, basis=identity, **settings)
    assert merged.exclusive["a"]["w"].right.shape[-2] == rank


def test_tasks_draw_masks_of_their_own():
    ones = {"w": torch.ones(40, 40)}
    settings = {"shared": {"w": torch.zeros(40, 40)}, "compression": "bernoulli", "rank_ratio": None, "basis": basis}
    merged = twin_merging.merge(ones, {"a": ones, "b": ones}, density=0.5, seed=0, **settings)
    first, second = (dense(merged.exclusive[task]["w"]) > 0 for task in ("a", "b"))
    assert 0.4 < (first == second).float().mean() < 0.6
