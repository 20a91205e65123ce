"""The router learns what can be told apart, repeats itself under a seed, and is chosen on held-out rows."""

import pytest
import torch
from omegaconf import OmegaConf

from support.commands import ROOT
from twinbench.routing.router import Mlp, Router, fit

RECIPE = {"hidden_ratio": 2.0, "dropout": 0.5, "lr": 5e-3, "epochs": 10, "batch_size": 16, "top_k": None}


def clusters(rows: int, seed: int, noise: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(99))
    experts = torch.arange(rows) % 3
    return centres[experts] + noise * torch.randn(rows, 8, generator=generator), experts


def test_learns_and_weights_sum_to_one():
    router = fit(Mlp(**RECIPE), clusters(240, 0), clusters(60, 1), seed=0)
    assert not router.training and not any(parameter.requires_grad for parameter in router.parameters())
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


def slow_fit(recipe: Mlp, train, held_out, seed: int, decay: bool = True, clip: float = 1.0) -> Router:
    """AdamW, its falling learning rate and the clipping of gradients written out; without dropout."""
    (features, experts), epoch_losses = train, []
    counts = experts.bincount().to(features)
    weight = len(experts) / counts / len(counts) if recipe.balanced else None
    torch.manual_seed(seed)
    router = Router(features.shape[1], len(counts), recipe)
    parameters = list(router.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    steps, done, taken = recipe.epochs * -(-len(features) // recipe.batch_size), 0, 0
    for _ in range(recipe.epochs):
        router.train()
        for rows in torch.randperm(len(features)).split(recipe.batch_size):
            rate = recipe.lr * (1 - done / steps) if decay else recipe.lr
            done += 1
            if len(rows) == 1:
                continue
            taken += 1
            loss = torch.nn.functional.cross_entropy(router.logits(features[rows]), experts[rows], weight)
            gradients = torch.autograd.grad(loss, parameters)
            norm = torch.cat([g.flatten() for g in gradients]).norm().item()
            with torch.no_grad():
                for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                    g = g * min(1.0, clip / (norm + 1e-6))
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.999).add_(0.001 * g * g)
                    p -= rate * (m / (1 - 0.9**taken)) / ((v / (1 - 0.999**taken)).sqrt() + 1e-8)
        router.eval()
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(router.logits(held_out[0]), held_out[1], weight).item()
        epoch_losses.append((loss, {name: tensor.clone() for name, tensor in router.state_dict().items()}))
    router.load_state_dict(min(epoch_losses, key=lambda epoch: epoch[0])[1])
    return router


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("balanced", [False, True])
def test_training_is_what_its_recipe_says(float64, balanced):
    """In float64: Adam blows up the rounding of the gradients that batch normalization makes zero."""
    recipe = Mlp(**RECIPE | {"dropout": 0.0, "epochs": 5}, balanced=balanced)
    rows = 4 * 16 + 1 + balanced  # the last batch has one row, which is left out, or two
    (features, experts), held_out = clusters(rows, 0, noise=1.0), clusters(30, 1, noise=1.0)
    experts = torch.where(torch.arange(rows) % 4 == 0, experts, 0)  # of one expert there are more rows
    given = (recipe, (features, experts), held_out, 3)
    found, wanted = fit(*given).logits(features), slow_fit(*given).logits(features)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    for changes in ({"decay": False}, {"clip": 1e9}):
        assert (slow_fit(*given, **changes).logits(features) - wanted).abs().max() > 1e-3, changes


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
        *(("groups", 0), ("tolerance", 1.0), ("tolerance", -0.1), ("hidden_ratio", 0), ("minimum_risk", True)),
        ("dropout", -0.1),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"router\.{name} must be .*, got {value}"):
        Mlp(**RECIPE | {name: value})


def test_defaults_are_those_of_the_papers_router():
    settings = dict(OmegaConf.load(ROOT / "conf" / "router" / "mlp.yaml"))
    del settings["_target_"]
    assert Mlp(**settings) == Mlp(**{name: settings[name] for name in RECIPE})


def test_a_loss_that_is_never_finite_is_an_error():
    features, experts = clusters(30, 1)
    with pytest.raises(ValueError, match=r"held-out loss was never finite; lower router\.lr=0\.005"):
        fit(Mlp(**RECIPE), clusters(60, 0), (features / 0, experts), seed=0)


def test_hidden_layers_have_a_share_of_the_features_width():
    for ratio, width in ((2.0, 16), (0.4, 3), (0.01, 1)):
        router = Router(8, 3, Mlp(**RECIPE | {"hidden_ratio": ratio}))
        assert [m.out_features for m in router.logits if hasattr(m, "out_features")] == [width, width, 3]


def test_minimum_risk_needs_balanced_rows_and_one_expert_a_row():
    for changes in ({"balanced": True}, {"top_k": 1}, {"balanced": True, "top_k": 2}):
        with pytest.raises(ValueError, match=r"router\.minimum_risk"):
            Mlp(**RECIPE | changes | {"minimum_risk": True})


def test_the_ends_of_ranges_are_legal():
    least = {"dropout": 0.0, "epochs": 1, "batch_size": 2, "top_k": 1, "groups": 1, "layer": 0, "rows": 2}
    Mlp(**RECIPE | least | {"tolerance": 0.0, "characters": 0, "balanced": True, "minimum_risk": True})
    Mlp(**RECIPE | {"source": None, "characters": 1, "hidden_ratio": 0.1, "tolerance": 0.5})


def test_as_many_as_there_are_experts_is_all_of_them():
    weights = [
        fit(Mlp(**RECIPE | {"top_k": k}), clusters(60, 0), clusters(30, 1), seed=0)(clusters(20, 2)[0])
        for k in (None, 3, 4)
    ]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


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
