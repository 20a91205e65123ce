"""One forward for a mixed batch equals a dense merge per sample: the definition, written out slowly."""

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, DynamicCache, MPNetConfig, MPNetForSequenceClassification
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from baselines import task_arithmetic
from support.family import CLASSES, tokenizer
from twinbench.merging import twin_merging
from twinbench.merging.compress import basis
from twinbench.merging.merged import Merged, materialize
from twinbench.routing.attach import attach
from twinbench.routing.per_route import _joined
from twinbench.weights.parts import LowRank, dense
from twinbench.weights.state_dict import read_checkpoint


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
        always = [(1.0, parts) for parts in merged.always]
        for weight, parts in [*always, *zip(route, merged.exclusive.values(), strict=True)]:
            for name, part in parts.items():
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
    with attach(model.bert, merged) as routes:
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
    with attach(model.bert, merged) as routes:
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
        with attach(model.bert, Merged(shared, matrices), tolerance) as routes:
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
    with attach(nn.Linear(3, 2), Merged({}, {t: {} for t in range(5)}), tolerance) as routes:
        routes.weights = weights
        times, added = taken_by(routes)
        assert times.max() == 1 and torch.equal(added, weights * times)
        assert (weights - added).max() <= tolerance
        assert (weights - added).sum(1).max() <= 5 * tolerance


def test_a_block_serves_experts_of_equally_many_samples():
    with attach(nn.Linear(3, 2), Merged({}, {t: {} for t in range(5)}), 0.02) as routes:

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
    with attach(net, Merged({}, exclusive), tolerance) as routes:
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
    with attach(model.bert, Merged({}, exclusive)) as routes:
        routes.weights = WEIGHTS
        once = model(**batch).logits
        repeated = {key: value.repeat_interleave(2, 0) for key, value in batch.items()}
        twice = model(**repeated, position_ids=positions).logits
    torch.testing.assert_close(twice, once.repeat_interleave(2, 0))


def test_a_batch_may_repeat_its_samples_but_must_fit_them():
    net, exclusive, ids = net_and_parts(nn.LayerNorm(8))
    with attach(net, Merged({}, exclusive)) as routes:
        routes.weights = TWO
        once = net(ids)
        torch.testing.assert_close(net(ids.repeat_interleave(3, 0)), once.repeat_interleave(3, 0))
        for rows in (1, 3, 6):
            with pytest.raises(ValueError, match=rf"Net sees a batch of {rows}.* 4 samples"):
                net(ids.repeat(2, 1)[:rows])
        with pytest.raises(ValueError, match=r"2 experts"):
            routes.weights = torch.ones(4, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_single(dtype):
    net, exclusive, ids = net_and_parts(nn.LayerNorm(8))
    expected = alone(net, exclusive, TWO, ids)
    net, exclusive, ids = net_and_parts(nn.LayerNorm(8), dtype)
    with attach(net, Merged({}, exclusive)) as routes:
        routes.weights = TWO
        got = net(ids)
    assert got.dtype == dtype
    assert (got.float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_autocast_stays_near_single_and_gradients_pass():
    net, exclusive, ids = net_and_parts(nn.LayerNorm(8))
    expected = alone(net, exclusive, TWO, ids)
    net.requires_grad_(True)
    with attach(net, Merged({}, exclusive)) as routes:
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


class Flat(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias.float()


class Convolution(nn.Conv1d):
    def forward(self, x):
        return super().forward(x.mT).mT


class Odd(nn.Linear):
    """Its weight is used by an operation that nothing is known about."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.tanh(), 1 - self.bias)


@pytest.mark.parametrize(
    "changes",
    [
        {"embed": Scaled(9, 8)},
        {"up": Flat(8, 8)},
        {"up": Convolution(8, 8, 3, padding=1)},
        {"up": Odd(8, 8)},
        {"up": Odd(8, 8), "down": Odd(8, 3)},
    ],
    ids=str,
)
def test_layers_of_other_kinds(changes):
    net, _, ids = net_and_parts(nn.LayerNorm(8))
    for name, module in changes.items():
        setattr(net, name, module.requires_grad_(False))
    exclusive = {t: {n: 0.5 * torch.randn(p.shape) for n, p in net.named_parameters()} for t in "ab"}
    expected = alone(net, exclusive, TWO, ids)
    with attach(net, Merged({}, exclusive)) as routes:
        routes.weights = TWO
        torch.testing.assert_close(net(ids), expected, atol=1e-4, rtol=1e-4)
    assert not any("forward" in module.__dict__ for module in net.modules())
    assert all(type(parameter) is nn.Parameter for parameter in net.parameters())


class Reader(Net):
    """Reads the weight of a module that never runs, and has the sequence first."""

    def __init__(self):
        super().__init__(nn.LayerNorm(8))
        self.table, self.unused = nn.Embedding(6, 8), nn.Linear(8, 8)

    def forward(self, ids, cache_position=None):
        x = self.norm(self.up(self.embed(ids).transpose(0, 1)).relu())
        return self.down((x + self.table.weight[:, None]).transpose(0, 1))


def test_a_weight_that_is_read_elsewhere_and_a_sequence_first_layout():
    torch.manual_seed(1)
    net = Reader().eval().requires_grad_(False)
    exclusive, ids = random_parts(net, (2, 3), 0.5), torch.randint(9, (4, 6))
    expected = alone(net, exclusive, TWO, ids)
    with attach(net, Merged({}, exclusive)) as routes:
        for rows in ([0, 1, 2, 3], [0, 1], [3]):
            routes.weights = TWO[rows]
            torch.testing.assert_close(net(ids[rows]), expected[rows], atol=1e-4, rtol=1e-4)
            positions = torch.arange(6)  # a vector is no batch, also where it is longer
            assert torch.equal(net(ids[rows], cache_position=positions), net(ids[rows]))
        routes.weights = TWO[:1]
        assert torch.equal(net(ids[:1], cache_position=torch.arange(6)), net(ids[:1]))


class Pieces(Net):
    """Uses a weight whole, and again in pieces and as a number, none of which is a tensor of its own."""

    def forward(self, ids):
        x = self.embed(ids)
        pieces = [x @ piece.T for piece in self.embed.weight.chunk(3)]
        return torch.cat([*pieces, self.down(self.norm(self.up(x))) * self.norm.weight.max().item()], -1)


class Named(Net):
    """Gives weights by their argument's name."""

    def forward(self, ids):
        x = nn.functional.embedding(ids, weight=self.embed.weight)
        return self.down(self.norm(nn.functional.linear(x, weight=self.up.weight, bias=self.up.bias)))


@pytest.mark.parametrize("kind", [Pieces, Named])
def test_a_weight_keeps_its_parts_however_it_is_given(kind):
    torch.manual_seed(0)
    net = kind(nn.LayerNorm(8)).eval().requires_grad_(False)
    exclusive, ids = random_parts(net, (2, 3), 0.5), torch.randint(9, (4, 6))
    expected = alone(net, exclusive, TWO, ids)
    with attach(net, Merged({}, exclusive)) as routes:
        routes.weights = TWO
        torch.testing.assert_close(net(ids), expected, atol=1e-4, rtol=1e-4)


class Hidden(Net):
    """Computes with a copy of a weight that no operation is asked for."""

    def __init__(self):
        super().__init__(nn.LayerNorm(8))
        self.tables = [self.up.weight]
        self.copies = [self.embed.weight]

    def forward(self, ids):
        return self.down(self.norm(nn.functional.linear(self.embed(ids), self.tables[0])))


class Mixed(Net):
    """Looks at other samples, so a sample alone is not what it is in a batch; alone it may be no number at all."""

    statistic = torch.mean

    def forward(self, ids):
        x = self.embed(ids)
        return self.down(self.norm(x + type(self).statistic(x, 0, keepdim=True)))


class Spread(Mixed):
    statistic = torch.std


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize(
    "kind", [Hidden, lambda: Mixed(nn.LayerNorm(8)), lambda: Spread(nn.LayerNorm(8))], ids=["Hidden", "Mixed", "Spread"]
)
def test_what_would_be_silently_wrong_is_refused(kind):
    torch.manual_seed(0)
    net = kind().eval().requires_grad_(False)
    exclusive, before = random_parts(net, (2, 3), 0.5), {n: p.clone() for n, p in net.named_parameters()}
    match = (
        "up.weight"
        if isinstance(net, Hidden)
        else r"does not support (Mixed|Spread): .* differ from the dense merge by"
    )
    with attach(net, Merged({}, exclusive)) as routes:
        routes.weights = TWO
        with pytest.raises(ValueError, match=match):
            net(torch.randint(9, (4, 6)))
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


class Picking(Net):
    """Two experts of plain layers, each on the tokens that go to it."""

    def __init__(self):
        super().__init__(nn.LayerNorm(8))
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, ids):
        x, mixed = self.embed(ids), torch.zeros(*ids.shape, 8)
        for which, expert in enumerate(self.experts):
            mixed[ids % 2 == which] = expert(x[ids % 2 == which])
        return self.down(self.norm(mixed))


@pytest.mark.parametrize(
    "first", [[[0, 2, 1, 3], [4, 6, 5, 7]], [[0, 2, 4, 6], [2, 4, 6, 0]]], ids=["as many tokens", "all tokens"]
)
def test_tokens_that_a_model_picks_never_take_the_route_of_another_sample(first):
    """The first batch picks equally many tokens of each sample, which looks like samples; the second does not."""
    torch.manual_seed(0)
    net = Picking().eval().requires_grad_(False)
    exclusive, two = random_parts(net, (2, 3), 0.5), torch.eye(2)
    batches = [torch.tensor(ids) for ids in (first, [[0, 2, 4, 1], [1, 3, 5, 0]])]
    expected = [alone(net, exclusive, two, ids) for ids in batches]
    with attach(net, Merged({}, exclusive)) as routes:
        for ids, wanted in zip(batches, expected, strict=True):
            routes.weights = two
            try:
                found = net(ids)
            except ValueError as error:
                assert "which are no samples and not all of their tokens" in str(error)
            else:
                torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_what_no_sample_owns_is_joined_only_where_all_routes_agree():
    same, other = torch.ones(2, 3), torch.zeros(2, 3)
    sizes, order = [1, 1, 1], torch.arange(3)
    assert torch.equal(_joined("m: x", [same, same.clone(), same.clone()], None, sizes, order), same)
    for pieces in ([same, same, other], [same, other, same]):
        with pytest.raises(ValueError, match="m: x, which differs between routes and has no samples"):
            _joined("m: x", pieces, None, sizes, order)


class Cached(Net):
    def forward(self, ids, cache=None):
        return self.odd(self.embed(ids), cache)

    def odd(self, x, cache):
        return nn.functional.linear(x, self.up.weight.tanh())


def test_a_cache_is_not_cut_into_routes():
    net, exclusive, ids = net_and_parts(nn.LayerNorm(8))
    net.__class__ = Cached
    exclusive = {t: {"up.weight": parts["up.weight"]} for t, parts in exclusive.items()}
    with attach(net, Merged({}, exclusive)) as routes:
        routes.weights = TWO
        with pytest.raises(ValueError, match=r"Cached.* batch_size=1"):
            net(ids, DynamicCache())
        routes.weights = TWO[:1]
        net(ids[:1], DynamicCache())


def test_weights_below_zero_are_kept_and_others_replace_them_on_every_device():
    with attach(nn.Linear(3, 2), Merged({}, {t: {} for t in range(2)}), 1e-3) as routes:
        for weights in (torch.tensor([[-0.5, 1.5]]), torch.tensor([[2.0, 1e-4], [0.0, -3.0]])):
            routes.weights = weights
            _, added = taken_by(routes)
            assert torch.equal(added, weights * (weights.abs() > 1e-3))
            there = routes.on(torch.device("meta"))
            assert there is routes.on(torch.device("meta")) and there.weights.shape == weights.shape
            held = [there.weights, *(block.weights for block in (*there.blocks, *there.single.values()))]
            held += [b.samples for b in (*there.blocks, *there.single.values()) if not isinstance(b.samples, slice)]
            assert all(tensor.is_meta for tensor in held)


def test_a_module_of_the_model_may_run_alone_with_one_route():
    net, exclusive, ids = net_and_parts(nn.LayerNorm(8))
    expected = (net.embed.weight + dense(exclusive["1"]["embed.weight"]))[ids]
    with attach(net, Merged({}, exclusive)) as routes:
        routes.weights = torch.tensor([[0.0, 1.0]])
        torch.testing.assert_close(net.embed(ids), expected)
        routes.weights = TWO
        with pytest.raises(ValueError, match="the whole Net"):
            net.embed(ids)


def test_no_weights_are_an_error():
    net, exclusive, ids = net_and_parts(nn.LayerNorm(8))
    shared = net.embed(ids)
    with attach(net, Merged({}, exclusive)):
        assert torch.equal(net.embed(ids), shared), "outside of a forward the parameters are the shared ones"
        with pytest.raises(ValueError, match="not set"):
            net(ids)


@pytest.mark.parametrize(
    ("parts", "tolerance", "match"),
    [
        ({"1.weight": torch.ones(2, 2)}, 0.0, "1.weight of t"),
        ({}, -0.1, "tolerance"),
        ({}, 1.0, "tolerance"),
    ],
)
def test_parts_without_a_place_and_tolerances_out_of_range_are_refused(parts, tolerance, match):
    model = nn.ModuleDict({"0": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=match), attach(model, Merged({}, {"t": parts}), tolerance):
        pass


@torch.inference_mode()
def test_parts_for_every_input_are_added_beside_the_routed_ones(family, parts):
    base, experts, shared = parts
    settings = {"compression": "svd", "rank_ratio": 0.2, "density": None, "seed": 0, "basis": basis}
    low = materialize(twin_merging.merge(base, experts, shared=shared, **settings)).exclusive
    names = list(low)
    merged = Merged(shared, {t: low[t] for t in names[:2]}, always=(low[names[2]], {}))
    model, batch = model_and_batch(family)
    routed = WEIGHTS[:, :2]
    expected = per_sample_dense(model, batch, merged, routed)
    nothing = per_sample_dense(model, batch, Merged(shared, always=merged.always), torch.zeros(len(routed), 0))
    model.bert.load_state_dict(shared)
    with attach(model.bert, merged, 1e-6) as routes:
        routes.weights = routed
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)
        assert routes.weights[:, :2].eq(1).all() and torch.equal(routes.weights[:, 2:], routed)
        with pytest.raises(ValueError, match=r"weights must be \(samples, 2 experts\), got \(5, 4\)"):
            routes.weights = torch.ones(5, 4)
    with attach(model.bert, Merged({}, always=merged.always)) as routes:
        routes.weights = torch.zeros(1, 0)  # one row for all samples
        torch.testing.assert_close(model(**batch).logits, nothing, atol=1e-5, rtol=0)


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
        with attach(model.mpnet, Merged({}, exclusive), tolerance) as routes:
            routes.weights = WEIGHTS
            got = model(**batch).logits
            repeated = model(**{key: value.repeat_interleave(2, 0) for key, value in batch.items()}).logits
        expected = per_sample_dense(model, batch, Merged(merged.shared, exclusive), WEIGHTS, model.mpnet)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(repeated, got.repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)
        assert (got - static).abs().max() > 1e-2
        model.mpnet.load_state_dict(merged.shared)
        assert torch.equal(model(**batch).logits, static), "afterwards the model is the shared expert again"
