"""The paper's group-wise routes: near rows share the mean of their weights, and no row changes its expert."""

import pytest
import torch

from support.family import CLASSES, bench, opened
from support.routing import STATIC, recipe
from twinbench import benchmark
from twinbench.merging import twin_merging
from twinbench.merging.compress import basis
from twinbench.merging.method import Method
from twinbench.protocol import PROTOCOLS
from twinbench.routing import batch, learned
from twinbench.routing.learned import Setting
from twinbench.routing.router import grouped
from twinbench.workloads.classification import score as classification


def drawn(rows: int, experts: int = 4) -> torch.Tensor:
    return 3 * torch.randn(rows, experts, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("groups", [1, 3, 20])
def test_rows_of_a_group_share_the_mean_of_their_weights(groups):
    logits = drawn(200)
    weights = logits.softmax(1)
    shared = grouped(weights, logits, groups, seed=0)
    torch.testing.assert_close(shared.sum(1), torch.ones(200))
    assert torch.equal(shared.argmax(1), weights.argmax(1))
    for route in shared.unique(dim=0):
        members = (shared == route).all(1)
        torch.testing.assert_close(weights[members].mean(0), route)
    for expert in range(4):
        assert 1 <= len(shared[weights.argmax(1) == expert].unique(dim=0)) <= groups


def test_more_groups_stay_nearer_and_as_many_as_rows_change_nothing():
    logits = drawn(120)
    weights = logits.softmax(1)
    moved = [(grouped(weights, logits, groups, seed=0) - weights).abs().sum().item() for groups in (1, 5, 20)]
    assert moved[0] > moved[1] > moved[2] > 0
    assert torch.equal(grouped(weights, logits, 120, seed=0), weights)


def test_repeats_itself_and_takes_equal_rows():
    logits = drawn(150)
    first, again = (grouped(logits.softmax(1), logits, 4, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    equal = drawn(2).repeat(50, 1)  # both rows in one bin
    assert torch.equal(grouped(equal.softmax(1), equal, 2, seed=0).unique(dim=0), equal.softmax(1).unique(dim=0))


def test_groups_must_be_positive():
    with pytest.raises(ValueError, match=r"router\.use\.groups"):
        recipe(groups=0)


def test_a_grouped_router_gives_a_split_few_routes(family):
    shared, routes = bench(opened(family)), {}
    for groups in (None, 1):
        setting = Setting(STATIC, None, recipe(groups=groups), 0)
        routes[groups] = {task: learned.weights(shared, setting, task, "test")[0] for task in CLASSES}
    for task in CLASSES:
        experts = routes[None][task].argmax(1)
        assert len(routes[None][task].unique(dim=0)) > len(CLASSES)
        assert torch.equal(routes[1][task].argmax(1), experts)
        assert len(routes[1][task].unique(dim=0)) == len(experts.unique())


@pytest.fixture
def twin():
    return Method(
        "twin",
        "twin",
        lambda base, experts, shared: twin_merging.merge(
            base, experts, shared=shared, compression="svd", rank_ratio=0.2, density=None, seed=0, basis=basis
        ),
        route="router",
        shared=STATIC,
    )


def test_a_grouped_run_scores_every_task(family, twin):
    rows, predictions = benchmark.run(
        bench(opened(family)), Setting(twin, "router", recipe(groups=2), 0), PROTOCOLS["strict"]
    )
    assert {row["task"] for row in rows if row["primary"]} == set(CLASSES)
    assert len(predictions) == 10 * len(CLASSES)


def test_groups_merged_once_each_score_as_rows_routed_one_by_one(family, twin, monkeypatch):
    logits = {}
    for shared in (1, 10**6):
        monkeypatch.setattr(batch, "SHARED", shared)
        setting, own = Setting(twin, "router", recipe(groups=2), 0), bench(opened(family))
        logits[shared] = {task: classification._forward(own, setting, task, "test")[0] for task in CLASSES}
    for task in CLASSES:
        torch.testing.assert_close(logits[1][task], logits[10**6][task], rtol=0, atol=1e-5)


def test_a_tolerance_drops_small_weights_alone(family, twin, monkeypatch):
    monkeypatch.setattr(batch, "SHARED", 10**6)
    shared, logits = bench(opened(family)), {}
    for tolerance in (0.0, 1e-6, 0.35):
        setting = Setting(twin, "router", recipe(epochs=40, tolerance=tolerance), 0)
        found = [classification._forward(shared, setting, task, "test")[0] for task in CLASSES]
        logits[tolerance] = torch.cat([each.flatten() for each in found])
    torch.testing.assert_close(logits[1e-6], logits[0.0], rtol=0, atol=1e-5)
    moved = (logits[0.35] - logits[0.0]).abs().max()
    assert 1e-4 < moved < 0.35 * len(CLASSES) * logits[0.0].abs().max()
    with pytest.raises(ValueError, match=r"router\.use\.tolerance must be in \[0, 1\)"):
        recipe(tolerance=1.0)
