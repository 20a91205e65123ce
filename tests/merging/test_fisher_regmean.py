"""Fisher merging and RegMean: limit cases, and the problems that they solve, solved another way."""

import math

import pytest
import torch

from baselines import average, esm, fisher, regmean, regmean_pp, tsv_m
from support.commands import ROOT
from support.methods import assert_same, call, grams, information, models
from twinbench.merging.compress import basis

NUMBERS = {
    "fisher": {"rows": 8, "normalize": False, "ridge": 1e-9},
    "regmean": {"rows": 8, "scaling": 1.0, "ridge": 1e-12},
}
ASKS = {"fisher": "fisher", "regmean": "gram"}


def fisher_merged(base, experts, statistics, **changes) -> dict:
    given = NUMBERS["fisher"] | changes
    return dict(fisher.merge(base, experts, **given, fisher=lambda expert, rows: statistics[expert]).shared)


def regmean_merged(base, experts, statistics, **changes) -> dict:
    given = NUMBERS["regmean"] | changes
    return dict(regmean.merge(base, experts, **given, gram=lambda expert, rows: statistics[expert]).shared)


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_information_gives_the_average(normalize):
    base, experts = models()
    mean = dict(average.merge(base, experts).shared)
    same = dict.fromkeys(experts, information(base, "all"))
    assert_same(fisher_merged(base, experts, same, normalize=normalize), mean, 1e-6)
    assert_same(fisher_merged(base, experts, {expert: {} for expert in experts}, normalize=normalize), mean, 1e-6)


def test_fisher_is_the_weighted_average_written_out():
    base, experts = models()
    found = {expert: information(base, expert) for expert in experts}
    found["task1"] = {name: 10 * tensor for name, tensor in found["task1"].items()}
    norms = {e: math.sqrt(sum(float((t**2).sum()) for t in own.values())) for e, own in found.items()}
    for normalize in (False, True):
        least = 0.01 * (sum(1 / norm for norm in norms.values()) / len(norms) if normalize else 1)
        weights = {
            e: {n: t / (norms[e] if normalize else 1) + least for n, t in own.items()} for e, own in found.items()
        }
        wanted = {
            n: sum(weights[e][n] * experts[e][n] for e in experts) / sum(weights[e][n] for e in experts) for n in base
        }
        assert_same(fisher_merged(base, experts, found, normalize=normalize, ridge=0.01), wanted, 1e-6)
    scaled = {e: {n: s * t for n, t in found[e].items()} for s, e in zip((1e-3, 1.0, 1e3), experts, strict=True)}
    assert_same(
        fisher_merged(base, experts, scaled, normalize=True, ridge=1e-12),
        fisher_merged(base, experts, found, normalize=True, ridge=1e-12),
        1e-5,
    )


def test_where_no_expert_has_information_the_average_is_left_however_their_norms_differ():
    base, experts = models()
    found = {expert: information(base, expert) for expert in experts}
    for scale, own in zip((1e-8, 1.0, 1e3), found.values(), strict=True):
        own["up.weight"] = torch.zeros_like(own["up.weight"])
        own.update({name: scale * tensor for name, tensor in own.items()})
    merged = fisher_merged(base, experts, found, normalize=True, ridge=1e-6)
    assert_same(
        {"up.weight": merged["up.weight"]}, {"up.weight": average.merge(base, experts).shared["up.weight"]}, 1e-6
    )


def test_the_only_weight_with_information_wins():
    base, experts = models()
    found = {expert: information(base, expert) for expert in experts}
    for place, expert in enumerate(experts):
        found[expert] = {
            name: torch.where(tensor > 0, float(place == 1), 0.0) for name, tensor in found[expert].items()
        }
    assert_same(fisher_merged(base, experts, found), experts["task1"], 1e-6)


@pytest.mark.parametrize("method", [fisher_merged, regmean_merged])
def test_one_expert_is_that_expert(method):
    base, experts = models(count=1)
    statistics = {"task0": information(base, "a") if method is fisher_merged else grams(base, "a")}
    assert_same(method(base, experts, statistics), experts["task0"], 5e-7)


def test_equal_grams_give_the_average():
    base, experts = models()
    mean = dict(average.merge(base, experts).shared)
    assert_same(regmean_merged(base, experts, dict.fromkeys(experts, grams(base, "all"))), mean, 1e-6)
    assert_same(regmean_merged(base, experts, {expert: {} for expert in experts}), mean)


@pytest.mark.parametrize("scaling", [0.0, 0.4, 1.0])
def test_regmean_minimizes_the_distance_of_the_outputs(scaling):
    """With smaller off-diagonals each task has, beside its inputs, rows that see one input dimension each."""
    base, experts = models()
    torch.manual_seed(0)
    inputs, gram = {}, {}
    for expert, tokens in zip(experts, (5, 9, 30), strict=True):
        inputs[expert] = {n: torch.randn(tokens, base[n].shape[1]).double() for n in ("up.weight", "down.weight")}
        gram[expert] = {n: (x.T @ x / tokens).float() for n, x in inputs[expert].items()}
    merged = regmean_merged(base, experts, gram, scaling=scaling)
    for name in inputs["task0"]:
        rows = []
        for expert, own in inputs.items():
            x = own[name] / math.sqrt(len(own[name]))
            single = (x.square().sum(0) * (1 - scaling)).sqrt().diag()
            rows.append((torch.cat([math.sqrt(scaling) * x, single]), experts[expert][name].double()))
        left = torch.cat([x for x, _ in rows])
        right = torch.cat([x @ weight.T for x, weight in rows])
        wanted = torch.linalg.lstsq(left, right).solution.T
        torch.testing.assert_close(merged[name].double(), wanted, atol=1e-5, rtol=0)
    rest = [name for name in base if name not in inputs["task0"]]
    mean = average.merge(base, experts).shared
    assert all(torch.equal(merged[name], mean[name]) for name in rest)


def test_regmean_pp_merges_each_block_on_top_of_the_merged_ones():
    """What it hands to its statistics is merged below the block and the expert's from there on."""
    draw = torch.Generator().manual_seed(0)
    names = ["embed.weight", "layer.0.up.weight", "layer.1.up.weight", "layer.1.norm.weight"]
    shapes = [(5, 4), (4, 4), (4, 4), (4,)]
    make = lambda: {name: torch.randn(shape, generator=draw) for name, shape in zip(names, shapes, strict=True)}  # noqa: E731
    base, experts, asked = make(), {"a": make(), "b": make()}, []

    def statistics(state, expert, rows, layers):
        asked.append((expert, rows, tuple(layers), {name: tensor.clone() for name, tensor in state.items()}))
        return {name: torch.diag(state["embed.weight"][0].abs() + len(asked)) for name in layers}

    numbers = {"rows": 8, "scaling": 1.0, "ridge": 1e-12}
    merged = regmean_pp.merge(base, experts, **numbers, prefix_gram=statistics).shared
    mean = average.merge(base, experts).shared
    assert [(expert, rows, layers) for expert, rows, layers, _ in asked] == [
        (expert, 8, (f"layer.{number}.up.weight",)) for number in (0, 1) for expert in "ab"
    ]
    for number, (expert, _, _, state) in zip((0, 0, 1, 1), asked, strict=True):
        assert torch.equal(state["embed.weight"], mean["embed.weight"])
        below = merged if number else experts[expert]
        assert torch.equal(state["layer.0.up.weight"], below["layer.0.up.weight"])
        assert torch.equal(state["layer.1.up.weight"], experts[expert]["layer.1.up.weight"])
    for number in (0, 1):
        name = f"layer.{number}.up.weight"
        found = {
            expert: {name: torch.diag(mean["embed.weight"][0].abs() + 2 * number + place + 1)}
            for place, expert in enumerate(experts)
        }
        plain = regmean_merged({name: base[name]}, experts, found, ridge=1e-12)
        torch.testing.assert_close(merged[name], plain[name])
    assert torch.equal(merged["layer.1.norm.weight"], mean["layer.1.norm.weight"])


def test_directions_that_no_task_has_inputs_in_are_averaged():
    base, experts = models()
    seen = torch.zeros(8, 8)
    seen[:3, :3] = torch.eye(3)
    found = {expert: {"up.weight": seen * (place + 1)} for place, expert in enumerate(experts)}
    merged = regmean_merged(base, experts, found, ridge=1e-6)["up.weight"]
    mean = average.merge(base, experts).shared["up.weight"]
    torch.testing.assert_close(merged[:, 3:], mean[:, 3:], atol=1e-6, rtol=0)
    weighted = sum((place + 1) * own["up.weight"] for place, own in enumerate(experts.values())) / 6
    torch.testing.assert_close(merged[:, :3], weighted[:, :3], atol=1e-5, rtol=0)
    nothing = {expert: {"up.weight": torch.zeros(8, 8)} for expert in experts}
    torch.testing.assert_close(regmean_merged(base, experts, nothing)["up.weight"], mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("stem", "changes"),
    [
        ("fisher", {"rows": 0}),
        ("fisher", {"ridge": 0.0}),
        ("fisher", {"ridge": math.nan}),
        ("regmean", {"rows": 0}),
        ("regmean", {"ridge": 0.0}),
        ("regmean", {"scaling": 1.01}),
        ("regmean", {"scaling": -0.01}),
    ],
)
def test_hyperparameters_out_of_range_are_named_before_anything_is_asked_for(stem, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} must be"):
        call(ROOT / "conf" / "method" / f"{stem}.yaml", {}, {"task0": {}}, **changes, **{ASKS[stem]: None})


def test_the_ridge_of_regmean_is_a_share_of_the_inputs():
    base, experts = models()
    found = {expert: grams(base, expert) for expert in experts}
    larger = {expert: {name: 1e4 * tensor for name, tensor in own.items()} for expert, own in found.items()}
    one, other = (regmean_merged(base, experts, given, ridge=1e-2) for given in (found, larger))
    assert_same(one, other, 1e-5)


def test_grams_of_few_tokens_with_a_large_mean_are_regressed_all_the_same():
    """Rounding of float32 leaves such a sum without a Cholesky factor at a small ridge."""
    torch.manual_seed(0)
    shape = (6, 96)
    base = {"w.weight": torch.randn(shape)}
    experts = {f"t{k}": {"w.weight": base["w.weight"] + 0.1 * torch.randn(shape)} for k in range(3)}
    found = {}
    for expert in experts:
        inputs = torch.randn(8, shape[1]) + 30
        found[expert] = {"w.weight": inputs.T @ inputs / 8}
    total = sum(own["w.weight"].double() for own in found.values())
    assert torch.linalg.cholesky_ex(total + 1e-9 * total.diagonal().mean() * torch.eye(96))[1]
    merged = regmean_merged(base, experts, found, ridge=1e-9)["w.weight"]
    assert torch.isfinite(merged).all()
    found["t0"]["w.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="a sum of Gram matrices is not finite"):
        regmean_merged(base, experts, found)["w.weight"]


def test_a_layer_that_one_expert_has_no_inputs_of_is_averaged():
    base, experts = models()
    found = {expert: grams(base, expert) for expert in experts}
    del found["task1"]["up.weight"]
    merged, mean = regmean_merged(base, experts, found), average.merge(base, experts).shared
    assert torch.equal(merged["up.weight"], mean["up.weight"])
    assert not torch.allclose(merged["down.weight"], mean["down.weight"])


def test_esm_is_its_equation():
    base, experts = models()
    seen = {task: grams(base, f"{task} 5") for task in experts}
    merged = esm.merge(base, experts, rows=5, power=0.15, scaling=0.7, gram=lambda task, _: seen[task], basis=basis)
    for name in ("up.weight", "down.weight"):
        given = {task: (own[name] - base[name]).double() for task, own in experts.items()}
        height = len(base[name])
        kept = height // 3
        lefts, rights = [], []
        for task, tau in given.items():
            values, vectors = torch.linalg.eigh(tau @ seen[task][name].double() @ tau.T)
            values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
            weight = (values / values.mean()) ** 0.15
            weight = weight / weight.mean()
            lefts.append(vectors * weight)
            rights.append(weight[:, None] * (vectors.T @ tau))
        polars = []
        for stacked in (torch.cat(lefts, 1), torch.cat(rights)):
            u, s, v = torch.linalg.svd(stacked, full_matrices=False)
            polars.append(s.mean() * u @ v)
        wanted = 0.7 * polars[0] @ polars[1]  # each layer is alone of its kind
        torch.testing.assert_close((merged.shared[name] - base[name]).double(), wanted, atol=1e-5, rtol=1e-4)
    others = tsv_m.merge(base, experts, scaling=0.7, basis=basis).shared
    assert all(merged.shared[name].equal(others[name]) for name in ("embed.weight", "up.bias", "norm.weight"))


def test_esm_makes_loud_layers_louder():
    """Of two layers of one kind, one three times the other: (3 / 2)^2 and (1 / 2)^2 times what each was."""
    draw = torch.Generator().manual_seed(0)
    tau = 0.1 * torch.randn(6, 6, generator=draw)
    base = {f"layer.{i}.w": torch.zeros(6, 6) for i in range(2)}
    expert = {"layer.0.w": 3 * tau, "layer.1.w": tau}
    gram = {name: torch.eye(6) for name in base}
    found = esm.merge(base, {"a": expert}, rows=1, power=0.0, scaling=1.0, gram=lambda *_: gram, basis=basis).shared
    alone = esm.essential([tau], [torch.eye(6)], 0.0)
    louder = esm.essential([3 * tau], [torch.eye(6)], 0.0)
    share = float(louder.norm() / alone.norm())
    torch.testing.assert_close(found["layer.0.w"], louder * (2 * share / (1 + share)) ** 2)
    torch.testing.assert_close(found["layer.1.w"], alone * (2 / (1 + share)) ** 2)
