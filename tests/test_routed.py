"""One forward for a mixed batch equals a dense merge per sample: the definition, written out slowly."""

import pytest
import torch
from conftest import CLASSES, tokenizer
from torch import nn
from transformers import BertForSequenceClassification, MPNetConfig, MPNetForSequenceClassification
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from baselines import task_arithmetic
from twinbench import twin_merging
from twinbench.compress import LowRank, basis, dense
from twinbench.merged import Merged, materialize
from twinbench.routed import attach
from twinbench.state_dict import read_checkpoint


@pytest.fixture(scope="module")
def parts(family):
    def backbone(folder):
        found = read_checkpoint(folder)
        return {name.removeprefix("bert."): found[name] for name in found if not name.startswith("classifier")}

    base = backbone(family / "base")
    experts = {task: backbone(family / "experts" / task) for task in CLASSES}
    shared = dict(task_arithmetic.merge(base, experts, scaling=0.3).shared)
    return base, experts, shared


TEXTS = ["w0 w1", "w30 w31 w32 w33 w34 w35 w36", "w5", "w9 w20 w39 w2 w14", "unknown words here"]
WEIGHTS = torch.tensor([[1, 0, 0], [0, 1, 0], [0.2, 0.3, 0.5], [0, 0, 1], [0.6, 0.4, 0]])


def model_and_batch(family):
    model = BertForSequenceClassification.from_pretrained(family / "experts" / "colours").eval()
    return model, tokenizer()(TEXTS, padding=True, return_tensors="pt")


def per_sample_dense(model, batch, merged: Merged, weights, backbone=None):
    """Rebuild all weights for each sample and run it alone."""
    rows = []
    for row, route in enumerate(weights):
        state = {name: tensor.clone() for name, tensor in merged.shared.items()}
        for weight, expert in zip(route, merged.exclusive.values(), strict=True):
            for name, part in expert.items():
                state[name] += weight * dense(part)
        (backbone or model.bert).load_state_dict(state)
        length = int(batch["attention_mask"][row].sum())
        rows.append(model(**{key: value[row : row + 1, :length] for key, value in batch.items()}).logits)
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("compression", "rank_ratio", "density"),
    [("svd", 0.2, None), ("svd", 1.0, None), ("magnitude", None, 0.1), ("bernoulli", None, 0.5), ("none", None, None)],
)
@torch.inference_mode()
def test_mixed_batch_equals_per_sample_dense_merge(family, parts, compression, rank_ratio, density):
    base, experts, shared = parts
    settings = {"compression": compression, "rank_ratio": rank_ratio, "density": density, "seed": 0, "basis": basis}
    merged = materialize(twin_merging.merge(base, experts, shared=shared, **settings))
    model, batch = model_and_batch(family)
    expected = per_sample_dense(model, batch, merged, WEIGHTS)
    model.bert.load_state_dict(shared)
    static = model(**batch).logits
    with attach(model.bert, merged.exclusive) as routes:
        routes.weights = WEIGHTS
        got = model(**batch).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert (got - static).abs().max() > 1e-2, "the exclusive parts matter here"
    assert torch.equal(model(**batch).logits, static), "afterwards the model is the shared expert again"


@pytest.mark.parametrize("order", [None, [0, 0, 1, 1, 2], [2, 0, 1, 0, 2], [2, 2, 2, 2, 2]], ids=str)
@torch.inference_mode()
def test_experts_of_different_kinds_and_ranks_share_a_batch(family, parts, order):
    base, experts, shared = parts

    def exclusive(task, **settings):
        settings = {"rank_ratio": None, "density": None, "seed": 0, "basis": basis} | settings
        return twin_merging.merge(base, {task: experts[task]}, shared=shared, **settings).exclusive[task]

    mixed = {
        "letters": exclusive("letters", compression="svd", rank_ratio=0.1),
        "colours": exclusive("colours", compression="svd", rank_ratio=0.6),
        "size": exclusive("size", compression="magnitude", density=0.3),
    }
    weights = WEIGHTS if order is None else 0.7 * torch.eye(3)[order]  # one-hot, sorted or not, in groups of any size
    merged = materialize(Merged(shared, mixed))
    model, batch = model_and_batch(family)
    expected = per_sample_dense(model, batch, merged, weights)
    model.bert.load_state_dict(shared)
    with attach(model.bert, merged.exclusive) as routes:
        routes.weights = weights
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)


NEAR_ONE_HOT = torch.tensor(
    [[0.9995, 0.0003, 0.0002], [0.0001, 0.9998, 0.0001], [0.6, 0.3996, 0.0004], [0.0005, 0, 0.9995], [0.9999, 1e-4, 0]]
)


@torch.inference_mode()
def test_a_tolerance_drops_what_is_below_it_and_nothing_else(family, parts):
    base, experts, shared = parts
    settings = {"compression": "svd", "rank_ratio": 0.5, "density": None, "seed": 0, "basis": basis}
    exclusive = materialize(twin_merging.merge(base, experts, shared=shared, **settings)).exclusive
    matrices = {t: {n: p for n, p in found.items() if "LayerNorm" not in n} for t, found in exclusive.items()}
    model, batch = model_and_batch(family)
    model.bert.load_state_dict(shared)

    def logits(weights, tolerance):
        with attach(model.bert, matrices, tolerance) as routes:
            routes.weights = weights
            return model(**batch).logits

    dropped = logits(NEAR_ONE_HOT, 1e-3)
    torch.testing.assert_close(dropped, logits(NEAR_ONE_HOT * (NEAR_ONE_HOT > 1e-3), 0.0), atol=1e-6, rtol=0)
    assert 0 < (dropped - logits(NEAR_ONE_HOT, 0.0)).abs().max() < 1e-3
    torch.testing.assert_close(logits(WEIGHTS, 1e-3), logits(WEIGHTS, 0.0), atol=1e-6, rtol=0)


def taken_by(routes):
    """How often the blocks add each expert to each sample, and the weights that they add."""
    times, added = torch.zeros(routes.weights.shape), torch.zeros(routes.weights.shape)
    for block in routes.blocks:
        groups, size, each = block.weights.shape
        samples = torch.arange(len(added))[block.samples].view(groups, size, 1)
        experts = torch.tensor(block.experts).view(groups, 1, each)
        times[samples, experts] += 1
        added[samples, experts] += block.weights
    return times, added


@pytest.mark.parametrize("seed", range(5))
def test_blocks_take_each_weight_once_and_leave_out_no_more_than_the_bound(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = (6 * torch.randn(12, 5, generator=generator)).softmax(1)
    tolerance = 0.02
    with attach(nn.Linear(3, 2), {t: {} for t in range(5)}, tolerance) as routes:
        routes.weights = weights
        times, added = taken_by(routes)
        assert times.max() == 1 and torch.equal(added, weights * times)
        assert (weights - added).max() <= tolerance
        assert (weights - added).sum(1).max() <= 5 * tolerance


def test_a_block_serves_experts_of_equally_many_samples():
    with attach(nn.Linear(3, 2), {t: {} for t in range(5)}, 0.02) as routes:

        def blocks(weights):
            routes.weights = weights
            assert torch.equal(taken_by(routes)[1], weights)
            return [(block.experts, isinstance(block.samples, slice)) for block in routes.blocks]

        one_hot = torch.eye(5)
        assert blocks(one_hot.repeat_interleave(3, 0)) == [(range(5), True)]
        assert blocks(one_hot.repeat(3, 1)) == [(range(5), False)], "not sorted: samples are gathered"
        assert blocks(one_hot[[0, 0, 1, 3, 4]]) == [(range(1), True), (range(1, 2), True), (range(3, 5), True)]
        assert blocks(torch.full((12, 5), 0.2)) == [(range(5), True)]
        assert blocks(torch.zeros(4, 5)) == []


class Net(nn.Module):
    """All kinds of layers that take parts."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.embed, self.up, self.norm, self.down = nn.Embedding(9, 8), nn.Linear(8, 8), norm, nn.Linear(8, 3, False)

    def forward(self, ids):
        return self.down(self.norm(self.up(self.embed(ids)).relu()))


def random_parts(net: nn.Module, ranks, scale: float):
    """Per rank an expert: matrices of that rank, dense vectors."""

    def part(p, rank):
        if p.dim() == 1:
            return 2 * scale * torch.randn(p.shape)
        return LowRank(scale * torch.randn(p.shape[0], rank), scale * torch.randn(rank, p.shape[1]))

    return {str(t): {n: part(p, rank) for n, p in net.named_parameters()} for t, rank in enumerate(ranks)}


def net_and_parts(norm: nn.Module, dtype=torch.float32):
    torch.manual_seed(0)
    net = Net(norm).eval().requires_grad_(False)
    exclusive = random_parts(net, (2, 3), 0.5)
    return net.to(dtype), exclusive, torch.randint(9, (4, 6))


def alone(net, exclusive, weights, ids):
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    rows = []
    for route, row in zip(weights.tolist(), ids, strict=True):
        net.load_state_dict(
            {
                name: tensor + sum(w * dense(parts[name]) for w, parts in zip(route, exclusive.values(), strict=True))
                for name, tensor in state.items()
            }
        )
        rows.append(net(row[None]))
    net.load_state_dict(state)
    return torch.cat(rows)


TWO = torch.tensor([[1, 0], [0.3, 0.7], [0, 1], [0.9, 0.1]])


@pytest.mark.parametrize(
    "norm",
    [lambda: nn.LayerNorm(8), lambda: nn.RMSNorm(8), lambda: LlamaRMSNorm(8, eps=1e-3), lambda: GemmaRMSNorm(8)],
    ids=["LayerNorm", "RMSNorm", "LlamaRMSNorm", "GemmaRMSNorm"],
)
@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_norm_layers(norm, tolerance):
    net, exclusive, ids = net_and_parts(norm())
    expected = alone(net, exclusive, TWO, ids)
    with attach(net, exclusive, tolerance) as routes:
        routes.weights = TWO
        torch.testing.assert_close(net(ids), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_position_ids_given_once_serve_a_batch_that_repeats_its_samples(family, parts):
    base, experts, shared = parts
    settings = {"compression": "svd", "rank_ratio": 0.5, "density": None, "seed": 0, "basis": basis}
    exclusive = materialize(twin_merging.merge(base, experts, shared=shared, **settings)).exclusive
    model, batch = model_and_batch(family)
    model.bert.load_state_dict(shared)
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    with attach(model.bert, exclusive) as routes:
        routes.weights = WEIGHTS
        once = model(**batch).logits
        repeated = {key: value.repeat_interleave(2, 0) for key, value in batch.items()}
        twice = model(**repeated, position_ids=positions).logits
    torch.testing.assert_close(twice, once.repeat_interleave(2, 0))


def test_a_batch_may_repeat_its_samples_but_must_fit_them():
    net, exclusive, ids = net_and_parts(nn.LayerNorm(8))
    with attach(net, exclusive) as routes:
        routes.weights = TWO
        once = net(ids)
        torch.testing.assert_close(net(ids.repeat_interleave(3, 0)), once.repeat_interleave(3, 0))
        for rows in (1, 3, 6):
            with pytest.raises(ValueError, match=rf"embed sees a batch of {rows}.* 4 samples"):
                net(ids.repeat(2, 1)[:rows])
        with pytest.raises(ValueError, match=r"2 experts"):
            routes.weights = torch.ones(4, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_single(dtype):
    net, exclusive, ids = net_and_parts(nn.LayerNorm(8))
    expected = alone(net, exclusive, TWO, ids)
    net, exclusive, ids = net_and_parts(nn.LayerNorm(8), dtype)
    with attach(net, exclusive) as routes:
        routes.weights = TWO
        got = net(ids)
    assert got.dtype == dtype
    assert (got.float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_autocast_stays_near_single_and_gradients_pass():
    net, exclusive, ids = net_and_parts(nn.LayerNorm(8))
    expected = alone(net, exclusive, TWO, ids)
    net.requires_grad_(True)
    with attach(net, exclusive) as routes:
        routes.weights = TWO
        with torch.autocast("cpu", torch.bfloat16):
            got = net(ids)
        assert got.dtype == torch.bfloat16
        assert (got.float() - expected).abs().max() < 0.03 * expected.abs().max()
        net(ids).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Conv1d(2, 2, 1), (2, 2, 1)), (Scaled(3, 2), (3, 2)), (GatedRMSNorm(2), (2,))],
    ids=["Conv1d", "Scaled", "GatedRMSNorm"],
)
def test_a_part_of_an_unknown_module_is_refused(module, shape):
    model = nn.Sequential(module)
    with (
        pytest.raises(ValueError, match=type(module).__name__),
        attach(model, {"t": {"0.weight": torch.ones(shape)}}),
    ):
        pass
    assert not module._forward_hooks


@pytest.mark.parametrize(
    ("parts", "tolerance", "match"),
    [
        ({"1.weight": torch.ones(2, 2)}, 0.0, "1.weight of t"),
        ({"relative_attention_bias.weight": torch.ones(4, 2)}, 0.0, "pairs of positions"),
        ({}, -0.1, "tolerance"),
        ({}, 1.0, "tolerance"),
    ],
)
def test_parts_without_a_place_and_tolerances_out_of_range_are_refused(parts, tolerance, match):
    model = nn.ModuleDict({"0": nn.Linear(2, 2), "relative_attention_bias": nn.Embedding(4, 2)})
    with pytest.raises(ValueError, match=match), attach(model, {"t": parts}, tolerance):
        pass


def mpnet_and_merged() -> tuple[nn.Module, Merged]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MPNetConfig(**sizes, vocab_size=40, max_position_embeddings=20, initializer_range=0.3, num_labels=3)
    model = MPNetForSequenceClassification(config).eval()
    exclusive = random_parts(model.mpnet, (1, 2, 2), 0.3)
    exclusive["1"] |= {"encoder.relative_attention_bias.weight": torch.randn(32, 2)}
    del exclusive["2"]["encoder.relative_attention_bias.weight"]
    return model, Merged({name: p.detach().clone() for name, p in model.mpnet.named_parameters()}, exclusive)


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
@torch.inference_mode()
def test_every_sample_has_its_own_attention_bias_in_mpnet(tolerance):
    model, merged = mpnet_and_merged()
    mask = (torch.arange(9) < torch.tensor([4, 9, 2, 7, 5])[:, None]).long()
    batch = {"input_ids": torch.randint(3, 40, (5, 9)).where(mask.bool(), 1), "attention_mask": mask}
    static = model(**batch).logits
    only_bias = {t: {n: p for n, p in parts.items() if "relative" in n} for t, parts in merged.exclusive.items()}
    for exclusive in (merged.exclusive, only_bias):
        with attach(model.mpnet, exclusive, tolerance) as routes:
            routes.weights = WEIGHTS
            got = model(**batch).logits
            repeated = model(**{key: value.repeat_interleave(2, 0) for key, value in batch.items()}).logits
        expected = per_sample_dense(model, batch, Merged(merged.shared, exclusive), WEIGHTS, model.mpnet)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(repeated, got.repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)
        assert (got - static).abs().max() > 1e-2
        model.mpnet.load_state_dict(merged.shared)
        assert torch.equal(model(**batch).logits, static), "afterwards the model is the shared expert again"
