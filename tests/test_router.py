"""The router learns what can be told apart, repeats itself under a seed, and is chosen on held-out rows."""

import pytest
import torch

from twinbench.router import Mlp, fit

RECIPE = {"hidden_ratio": 2.0, "dropout": 0.5, "lr": 5e-3, "epochs": 10, "batch_size": 16, "top_k": None}


def clusters(rows: int, seed: int, noise: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(99))
    experts = torch.arange(rows) % 3
    return centres[experts] + noise * torch.randn(rows, 8, generator=generator), experts


def test_learns_and_weights_sum_to_one():
    router = fit(Mlp(**RECIPE), clusters(240, 0), clusters(60, 1), seed=0)
    features, experts = clusters(90, 2)
    weights = router(features)
    assert (weights.argmax(1) == experts).float().mean() > 0.95
    torch.testing.assert_close(weights.sum(1), torch.ones(90))


def test_deterministic_under_its_seed_and_leaves_the_callers_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = fit(Mlp(**RECIPE), clusters(60, 0), clusters(30, 1), seed=3)
    assert torch.equal(torch.rand(3), expected)
    torch.rand(7)
    again, other = (fit(Mlp(**RECIPE), clusters(60, 0), clusters(30, 1), seed=s) for s in (3, 4))
    features, _ = clusters(10, 2)
    assert torch.equal(first(features), again(features))
    assert not torch.equal(first(features), other(features))


def test_the_epoch_is_chosen_on_held_out_rows():
    """Held-out rows that say the opposite of the training rows make an early epoch the best one."""
    features, experts = clusters(120, 0)
    recipe = Mlp(**RECIPE | {"epochs": 30})
    fooled = fit(recipe, (features, experts), (features, (experts + 1) % 3), seed=0)
    normal = fit(recipe, (features, experts), clusters(60, 1), seed=0)
    loss = torch.nn.functional.cross_entropy
    assert loss(fooled.logits(features), experts) > 2 * loss(normal.logits(features), experts)


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_keeps_k_weights_that_sum_to_one(top_k):
    dense = fit(Mlp(**RECIPE), clusters(60, 0), clusters(30, 1), seed=0)
    sparse = fit(Mlp(**RECIPE | {"top_k": top_k}), clusters(60, 0), clusters(30, 1), seed=0)
    features, _ = clusters(20, 2)
    weights = sparse(features)
    assert ((weights > 0).sum(1) == top_k).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(20))
    assert torch.equal(weights.argmax(1), dense(features).argmax(1))


def test_a_last_batch_of_one_row_is_no_error():
    router = fit(Mlp(**RECIPE | {"batch_size": 16}), clusters(33, 0), clusters(9, 1), seed=0)
    assert torch.isfinite(router(clusters(5, 2)[0])).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", 0.0), ("dropout", 1.0), ("epochs", 0), ("batch_size", 1), ("top_k", 0), ("hidden_ratio", -1)),
        *(("source", "expert"), ("layer", -1), ("pool", "max"), ("rows", 1), ("characters", -1)),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"router.{name}"):
        Mlp(**RECIPE | {name: value})


def test_a_router_must_read_something():
    with pytest.raises(ValueError, match=r"router\.characters must be at least 0, or 1 where router\.source is null"):
        Mlp(**RECIPE, source=None)


def test_balanced_rows_count_the_same_for_every_expert():
    """Two experts that look alike: the one with a tenth of the rows gets its half only where rows are balanced."""
    generator = torch.Generator().manual_seed(0)
    features, experts = torch.randn(440, 8, generator=generator), (torch.arange(440) % 11 == 0).long()
    held_out = torch.randn(110, 8, generator=generator), (torch.arange(110) % 11 == 0).long()
    share = {}
    for balanced in (False, True):
        recipe = Mlp(**RECIPE | {"epochs": 5, "lr": 1e-3}, balanced=balanced)
        share[balanced] = fit(recipe, (features, experts), held_out, seed=0)(features)[:, 1].mean()
    assert share[False] < 0.35 and abs(share[True] - 0.5) < 0.15, share
