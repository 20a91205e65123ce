"""The paper's group-wise routes: near rows share the mean of their weights, and no row changes its expert."""

import pytest
import torch

from support.family import CLASSES, opened
from twinbench import benchmark
from twinbench.merging import twin_merging
from twinbench.merging.compress import basis
from twinbench.merging.merged import Merged
from twinbench.merging.method import Method
from twinbench.routing import learned
from twinbench.routing.learned import Setting
from twinbench.routing.router import Mlp, grouped
from twinbench.workloads.classification import score as classification

RECIPE = {"hidden_ratio": 2.0, "dropout": 0.5, "lr": 5e-3, "epochs": 3, "batch_size": 16, "top_k": None}


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
    with pytest.raises(ValueError, match=r"router\.groups"):
        Mlp(**RECIPE, groups=0)


def test_a_grouped_router_gives_a_split_few_routes(family):
    suite = opened(family)
    static = Method("average", lambda base, experts: Merged(base), None, None)
    routes = {}
    for groups in (None, 1):
        setting = Setting(False, Mlp(**RECIPE, groups=groups), 0, "cpu", 8)
        routes[groups] = {task: learned.weights(suite, static, setting, task, "test")[0] for task in CLASSES}
    for task in CLASSES:
        experts = routes[None][task].argmax(1)
        assert len(routes[None][task].unique(dim=0)) > len(CLASSES)
        assert torch.equal(routes[1][task].argmax(1), experts)
        assert len(routes[1][task].unique(dim=0)) == len(experts.unique())


@pytest.fixture
def twin():
    static = Method("base", lambda base, experts: Merged(base), None, None)
    return Method(
        "twin",
        lambda base, experts, shared: twin_merging.merge(
            base, experts, shared=shared, compression="svd", rank_ratio=0.2, density=None, seed=0, basis=basis
        ),
        "router",
        static,
    )


def test_a_grouped_run_scores_every_task(family, twin):
    rows, predictions = benchmark.run(opened(family), twin, Mlp(**RECIPE, groups=2), "strict", 0, "cpu", 8)
    assert {row["task"] for row in rows if row["primary"]} == set(CLASSES)
    assert len(predictions) == 10 * len(CLASSES)


def test_groups_merged_once_each_score_as_rows_routed_one_by_one(family, twin, monkeypatch):
    logits = {}
    for shared in (1, 10**6):
        monkeypatch.setattr(classification, "SHARED", shared)
        setting = Setting(False, Mlp(**RECIPE, groups=2), 0, "cpu", 8)
        suite = opened(family)
        logits[shared] = {
            task: classification._forward(suite, twin, "router", setting, task, "test")[0] for task in CLASSES
        }
    for task in CLASSES:
        torch.testing.assert_close(logits[1][task], logits[10**6][task], rtol=0, atol=1e-5)


def test_a_tolerance_drops_small_weights_alone(family, twin, monkeypatch):
    monkeypatch.setattr(classification, "SHARED", 10**6)
    suite, logits = opened(family), {}
    for tolerance in (0.0, 1e-6, 0.35):
        setting = Setting(False, Mlp(**RECIPE | {"epochs": 40}, tolerance=tolerance), 0, "cpu", 8)
        logits[tolerance] = torch.cat(
            [classification._forward(suite, twin, "router", setting, task, "test")[0].flatten() for task in CLASSES]
        )
    torch.testing.assert_close(logits[1e-6], logits[0.0], rtol=0, atol=1e-5)
    moved = (logits[0.35] - logits[0.0]).abs().max()
    assert 1e-4 < moved < 0.35 * len(CLASSES) * logits[0.0].abs().max()
    with pytest.raises(ValueError, match=r"router\.tolerance must be in \[0, 1\)"):
        Mlp(**RECIPE, tolerance=1.0)
