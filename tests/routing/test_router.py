"""The router learns what can be told apart, repeats itself under a seed, and is chosen on held-out rows."""

import pytest
import torch
from omegaconf import OmegaConf

from support.commands import ROOT
from support.routing import MODEL, READS, USE, recipe
from twinbench.routing.mlp import Layers, Mlp
from twinbench.routing.recipe import Features, Recipe, Use
from twinbench.routing.router import Router

TEN = {"epochs": 10}


def clusters(rows: int, seed: int, noise: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(99))
    experts = torch.arange(rows) % 3
    return centres[experts] + noise * torch.randn(rows, 8, generator=generator), experts


def fit(train, held_out, seed: int = 0, **changes) -> Router:
    """A router of ten epochs, trained; `changes` are of its recipe."""
    made = recipe(**TEN | changes)
    return Router(made.model.fit(train, held_out, seed), made.use).eval()


def test_learns_and_weights_sum_to_one():
    router = fit(clusters(240, 0), clusters(60, 1))
    assert not router.model.training and not any(parameter.requires_grad for parameter in router.parameters())
    features, experts = clusters(90, 2)
    weights = router(features)
    assert (weights.argmax(1) == experts).float().mean() > 0.95
    torch.testing.assert_close(weights.sum(1), torch.ones(90))


def test_deterministic_under_its_seed_and_leaves_the_callers_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = fit(clusters(60, 0), clusters(30, 1), seed=3)
    assert torch.equal(torch.rand(3), expected)
    torch.rand(7)
    again, other = (fit(clusters(60, 0), clusters(30, 1), seed=s) for s in (3, 4))
    features, _ = clusters(10, 2)
    assert torch.equal(first(features), again(features))
    assert not torch.equal(first(features), other(features))


def test_the_epoch_is_chosen_on_held_out_rows():
    """Held-out rows that say the opposite of the training rows make an early epoch the best one."""
    features, experts = clusters(120, 0)
    fooled = fit((features, experts), (features, (experts + 1) % 3), epochs=30)
    normal = fit((features, experts), clusters(60, 1), epochs=30)
    loss = torch.nn.functional.cross_entropy
    assert loss(fooled.logits(features), experts) > 2 * loss(normal.logits(features), experts)


def slow_fit(model: Mlp, train, held_out, seed: int, decay: bool = True, clip: float = 1.0) -> Layers:
    """AdamW, its falling learning rate and the clipping of gradients written out; without dropout."""
    (features, experts), epoch_losses = train, []
    counts = experts.bincount().to(features)
    weight = len(experts) / counts / len(counts) if model.balanced else None
    torch.manual_seed(seed)
    layers = Layers(features.shape[1], len(counts), model)
    parameters = list(layers.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    steps, done, taken = model.epochs * -(-len(features) // model.batch_size), 0, 0
    for _ in range(model.epochs):
        layers.train()
        for rows in torch.randperm(len(features)).split(model.batch_size):
            rate = model.lr * (1 - done / steps) if decay else model.lr
            done += 1
            if len(rows) == 1:
                continue
            taken += 1
            loss = torch.nn.functional.cross_entropy(layers.logits(features[rows]), experts[rows], weight)
            gradients = torch.autograd.grad(loss, parameters)
            norm = torch.cat([g.flatten() for g in gradients]).norm().item()
            with torch.no_grad():
                for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                    g = g * min(1.0, clip / (norm + 1e-6))
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.999).add_(0.001 * g * g)
                    p -= rate * (m / (1 - 0.9**taken)) / ((v / (1 - 0.999**taken)).sqrt() + 1e-8)
        layers.eval()
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(layers.logits(held_out[0]), held_out[1], weight).item()
        epoch_losses.append((loss, {name: tensor.clone() for name, tensor in layers.state_dict().items()}))
    layers.load_state_dict(min(epoch_losses, key=lambda epoch: epoch[0])[1])
    return layers


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("balanced", [False, True])
def test_training_is_what_its_recipe_says(float64, balanced):
    """In float64: Adam blows up the rounding of the gradients that batch normalization makes zero."""
    model = Mlp(**MODEL | {"dropout": 0.0, "epochs": 5, "balanced": balanced})
    rows = 4 * 16 + 1 + balanced  # the last batch has one row, which is left out, or two
    (features, experts), held_out = clusters(rows, 0, noise=1.0), clusters(30, 1, noise=1.0)
    experts = torch.where(torch.arange(rows) % 4 == 0, experts, 0)  # of one expert there are more rows
    given = ((features, experts), held_out, 3)
    found, wanted = model.fit(*given).logits(features), slow_fit(model, *given).logits(features)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    for changes in ({"decay": False}, {"clip": 1e9}):
        assert (slow_fit(model, *given, **changes).logits(features) - wanted).abs().max() > 1e-3, changes


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_keeps_k_weights_that_sum_to_one(top_k):
    dense = fit(clusters(60, 0), clusters(30, 1))
    sparse = fit(clusters(60, 0), clusters(30, 1), top_k=top_k)
    features, _ = clusters(20, 2)
    weights = sparse(features)
    assert ((weights > 0).sum(1) == top_k).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(20))
    assert torch.equal(weights.argmax(1), dense(features).argmax(1))


def test_a_last_batch_of_one_row_is_no_error():
    router = fit(clusters(33, 0), clusters(9, 1), batch_size=16)
    assert torch.isfinite(router(clusters(5, 2)[0])).all()


@pytest.mark.parametrize(
    ("leaf", "name", "value"),
    [
        *(("model", "lr", 0.0), ("model", "dropout", 1.0), ("model", "dropout", -0.1), ("model", "epochs", 0)),
        *(("model", "batch_size", 1), ("model", "hidden_ratio", -1), ("model", "hidden_ratio", 0)),
        *(("features", "source", "expert"), ("features", "layer", -1), ("features", "pool", "max")),
        *(("features", "rows", 1), ("features", "characters", -1)),
        *(("use", "top_k", 0), ("use", "groups", 0), ("use", "tolerance", 1.0), ("use", "tolerance", -0.1)),
        ("use", "minimum_risk", True),
    ],
)
def test_values_out_of_range_are_named(leaf, name, value):
    with pytest.raises(ValueError, match=rf"router\.{leaf}\.{name} must be .*, got {value}"):
        recipe(**{name: value})


def test_the_first_router_is_the_papers():
    """What it reads, and that all that the paper does not have is off."""
    leaves = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "router" / "mlp.yaml"))
    assert leaves["model"].pop("_target_") == "twinbench.routing.mlp.Mlp"
    found = Recipe(Features(**leaves["features"]), Mlp(**leaves["model"]), Use(**leaves["use"]))
    assert found.features == Features(**READS) and found.use == Use(**USE) and not found.model.balanced


def test_a_loss_that_is_never_finite_is_an_error():
    features, experts = clusters(30, 1)
    with pytest.raises(ValueError, match=r"held-out loss was never finite; lower router\.model\.lr=0\.005"):
        fit(clusters(60, 0), (features / 0, experts))


def test_hidden_layers_have_a_share_of_the_features_width():
    for ratio, width in ((2.0, 16), (0.4, 3), (0.01, 1)):
        layers = Layers(8, 3, recipe(hidden_ratio=ratio).model)
        assert [m.out_features for m in layers.logits if hasattr(m, "out_features")] == [width, width, 3]


def test_minimum_risk_needs_balanced_rows_and_one_expert_a_row():
    for changes in ({"balanced": True}, {"top_k": 1}, {"balanced": True, "top_k": 2}):
        with pytest.raises(ValueError, match=r"router\.use\.minimum_risk"):
            recipe(**changes, minimum_risk=True)


def test_the_ends_of_ranges_are_legal():
    least = {"dropout": 0.0, "epochs": 1, "batch_size": 2, "top_k": 1, "groups": 1, "layer": 0, "rows": 2}
    recipe(**least, tolerance=0.0, characters=0, balanced=True, minimum_risk=True)
    recipe(source=None, characters=1, hidden_ratio=0.1, tolerance=0.5)


def test_as_many_as_there_are_experts_is_all_of_them():
    weights = [fit(clusters(60, 0), clusters(30, 1), top_k=k)(clusters(20, 2)[0]) for k in (None, 3, 4)]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_a_router_must_read_something():
    said = r"router\.features\.characters must be at least 0, or 1 where router\.features\.source is null"
    with pytest.raises(ValueError, match=said):
        recipe(source=None)


def test_balanced_rows_count_the_same_for_every_expert():
    """Two experts that look alike: the one with a tenth of the rows gets its half only where rows are balanced."""
    generator = torch.Generator().manual_seed(0)
    features, experts = torch.randn(440, 8, generator=generator), (torch.arange(440) % 11 == 0).long()
    held_out = torch.randn(110, 8, generator=generator), (torch.arange(110) % 11 == 0).long()
    share = {}
    for balanced in (False, True):
        router = fit((features, experts), held_out, epochs=5, lr=1e-3, balanced=balanced)
        share[balanced] = router(features)[:, 1].mean()
    assert share[False] < 0.35 and abs(share[True] - 0.5) < 0.15, share
