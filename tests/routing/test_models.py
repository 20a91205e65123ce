"""Router models that draw nothing: nearest neighbours and prototypes, beside slow references and at their limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from support.commands import composed, rows_of
from support.family import CLASSES
from support.routing import USE
from twinbench.command import run
from twinbench.routing.knn import CHUNK, Knn
from twinbench.routing.prototypes import Prototypes
from twinbench.routing.recipe import Features, Recipe, Use
from twinbench.routing.router import Router, grouped

MODELS = [Knn(7, balanced=False), Knn(7, balanced=True), Prototypes(0.2), Prototypes(None)]


def clusters(rows: int, seed: int, noise: float = 1.0, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of three experts that overlap, far from 0; of the second there are half as many, of the third a quarter."""
    centres = torch.randn(3, width, generator=torch.Generator().manual_seed(99))
    experts = torch.tensor([0, 1, 0, 2, 0, 1, 0]).repeat(-(-rows // 7))[:rows]
    return 5 + centres[experts] + noise * torch.randn(
        rows, width, generator=torch.Generator().manual_seed(seed)
    ), experts


def fitted(model, **use) -> Router:
    return Router(model.fit(clusters(140, 0), clusters(70, 1), None), Use(**USE | use))


def cosine(first: list[float], second: list[float], mean: list[float]) -> float:
    a, b = ([value - m for value, m in zip(row, mean, strict=True)] for row in (first, second))
    lengths = [math.sqrt(sum(value * value for value in row)) for row in (a, b)]
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths[0] / lengths[1]


def means(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("balanced", [False, True])
def test_neighbours_are_those_of_a_loop_over_all_rows(balanced):
    (features, experts), test = clusters(140, 0), clusters(50, 2)[0]
    rows, owners = features.tolist(), experts.tolist()
    router = fitted(Knn(7, balanced))
    found = router(test)
    torch.testing.assert_close(router.logits(test).exp(), found)
    for weights, row in zip(found, test.tolist(), strict=True):
        near = sorted(range(140), key=lambda i: -cosine(row, rows[i], means(rows)))[:7]
        votes = [0.0, 0.0, 0.0]
        for i in near:
            votes[owners[i]] += 1 / owners.count(owners[i]) if balanced else 1
        torch.testing.assert_close(weights, torch.tensor([vote / sum(votes) for vote in votes]))
        assert [weight == 0 for weight in weights.tolist()] == [vote == 0 for vote in votes], "no share is no weight"


def test_prototypes_are_those_of_a_loop():
    (features, experts), test = clusters(140, 0), clusters(50, 2)[0]
    own = [means(features[experts == expert].tolist()) for expert in range(3)]
    found = fitted(Prototypes(0.2))(test)
    for weights, row in zip(found, test.tolist(), strict=True):
        scores = [math.exp(cosine(row, prototype, means(own)) / 0.2) for prototype in own]
        torch.testing.assert_close(weights, torch.tensor([score / sum(scores) for score in scores]))


def test_a_row_is_its_own_nearest_neighbour():
    features, experts = clusters(140, 0)
    assert torch.equal(fitted(Knn(1, balanced=False))(features), F.one_hot(experts).float())


def test_all_rows_as_neighbours_give_the_shares_of_the_experts():
    for balanced, shares in ((False, [4 / 7, 2 / 7, 1 / 7]), (True, [1 / 3, 1 / 3, 1 / 3])):
        weights = fitted(Knn(140, balanced))(clusters(20, 2)[0])
        torch.testing.assert_close(weights, torch.tensor([shares]).expand(20, 3))


def test_rows_that_are_equally_near_all_count_in_whatever_order():
    features, experts = torch.eye(4)[[0, 0, 1, 1, 2, 3]], torch.tensor([0, 1, 0, 2, 1, 2])
    for order in (range(6), reversed(range(6))):
        order = list(order)
        neighbours = Knn(1, balanced=False).fit((features[order], experts[order]), clusters(7, 1, width=4), None)
        weights = neighbours.logits(torch.eye(4)).softmax(1)
        torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 1.0, 0], [0, 0, 1.0]]))


def test_rows_are_compared_in_portions_that_change_nothing():
    router, rows = fitted(Knn(7, balanced=True)), clusters(2 * CHUNK + 3, 2)[0]
    torch.testing.assert_close(router(rows), torch.cat([router(row[None]) for row in rows]))


def test_equal_prototypes_give_equal_weights():
    features = clusters(70, 0)[0].repeat_interleave(3, 0)
    for temperature in (None, 0.1):
        means = Prototypes(temperature).fit((features, torch.arange(210) % 3), clusters(70, 1), None)
        weights = means.logits(clusters(20, 2)[0]).softmax(1)
        torch.testing.assert_close(weights, torch.full((20, 3), 1 / 3), atol=1e-4, rtol=0)


def test_the_fitted_temperature_is_the_best_on_the_held_out_rows():
    """The loss of an average over experts, though they have unequally many rows: worse at each value of a fine grid."""
    (features, experts), found = clusters(70, 1), fitted(Prototypes(None)).model

    def loss(model) -> float:
        each = F.cross_entropy(model.logits(features), experts, reduction="none")
        return sum(each[experts == expert].mean().item() for expert in range(3)) / 3

    best, fitted_temperature = loss(found), found.temperature.item()
    grid = [fitted_temperature * 2 ** (step / 8) for step in range(-24, 25) if step]
    assert all(loss(fitted(Prototypes(t)).model) > best for t in grid)
    assert best < 0.8 * loss(fitted(Prototypes(1.0)).model)


def test_the_temperature_follows_the_held_out_rows():
    """Held-out rows of another noise want another sharpness; those that say nothing want equal weights."""
    train, (features, experts) = clusters(140, 0), clusters(140, 2)
    sharp, soft, none = (
        Prototypes(None).fit(train, held_out, None).temperature.item()
        for held_out in (clusters(70, 1, noise=0.3), clusters(70, 1, noise=2.0), (features, experts.roll(3)))
    )
    assert sharp < soft / 2 and none > 2 * soft


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_no_seed_and_no_random_state_changes_a_model(model):
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        router = Router(model.fit(clusters(140, 0), clusters(70, 1), seed), Use(**USE))
        assert not [*router.parameters()], "nothing is left to train"
        before = torch.random.get_rng_state()
        found.append(router(clusters(20, 2)[0]))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(*found)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_what_is_stored_makes_the_same_weights(model):
    """A second model takes the tensors of the first: nothing that inference reads is left out."""
    router, rows = fitted(model), clusters(30, 2)[0]
    again = Router(model.fit(clusters(140, 0), clusters(70, 1), None), Use(**USE)).model
    for buffer in again.state_dict().values():
        buffer.zero_()
    again.load_state_dict(router.stored())
    assert torch.equal(again.logits(rows), router.logits(rows))
    stored = sum(tensor.nbytes for tensor in router.stored().values())
    floats = 4 * 8  # of one row
    assert stored == (141 * floats + 140 * 8 if isinstance(model, Knn) else 4 * floats + 4)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_weights_are_used_as_those_of_any_model(model):
    rows = clusters(60, 2)[0]
    whole = fitted(model)
    weights = whole(rows)
    torch.testing.assert_close(weights.sum(1), torch.ones(60))
    one = fitted(model, top_k=1)(rows)
    assert ((one > 0).sum(1) == 1).all() and (weights.gather(1, one.argmax(1)[:, None])[:, 0] == weights.amax(1)).all()
    shared = grouped(weights, whole.logits(rows), 2, seed=0)
    torch.testing.assert_close(shared.sum(1), torch.ones(60))
    assert len(shared.unique(dim=0)) <= 6
    costs = torch.tensor([[0.0, 1.0, 1.0], [9.0, 0.0, 9.0], [1.0, 1.0, 0.0]])
    careful = Router(whole.model, Use(**USE | {"top_k": 1, "minimum_risk": True}), costs)(rows)
    assert torch.equal(careful.argmax(1), (weights @ costs).argmin(1))


def test_least_expected_loss_needs_experts_that_count_the_same():
    features, use = Features("shared", None, "mean", 0, None), Use(**USE | {"top_k": 1, "minimum_risk": True})
    for model in (Knn(3, balanced=True), Prototypes(None)):
        Recipe(features, model, use)
    with pytest.raises(ValueError, match=r"router\.model\.balanced is true"):
        Recipe(features, Knn(3, balanced=False), use)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"router\.model\.neighbours must be at least 1, got 0"):
        Knn(0, balanced=True)
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match=rf"router\.model\.temperature must be null or above 0, got {wrong}"):
            Prototypes(wrong)
    with pytest.raises(ValueError, match=r"router\.model\.neighbours must be at most the 140 training rows, got 141"):
        fitted(Knn(141, balanced=True))


@pytest.mark.parametrize("router", ["knn", "prototypes"])
def test_a_run_is_measured_and_another_seed_is_the_same_run(family, tmp_path, router):
    def status(*more: str) -> str:
        return run(composed(family / "conf", tmp_path, "method=twin_merging", f"router={router}", *more)).status

    assert status() == "ok"
    assert status("seed=1") == "skipped"
    rows = rows_of(tmp_path, primary=True)
    assert {row["task"] for row in rows} == set(CLASSES)
    assert {(row["router"]["name"], row["seed"]) for row in rows} == {(router, None)}
    assert min(row["router_bytes"] for row in rows) > 0
    accuracy = rows_of(tmp_path, metric="router_accuracy")
    assert len(accuracy) == 3 and min(row["value"] for row in accuracy) > 0.6, "each task has words of its own"
    assert status("router.use.groups=2") == "ok"
