"""Gates in every linear layer equal their definition, written out over tokens, experts and layers."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from baselines import smile
from support.family import CLASSES, bench, opened, tokenizer
from support.language import NEW, generated, left_padded, log_likelihoods, prompts
from twinbench.merging.compress import basis, magnitude
from twinbench.merging.gates import Projections, Prototypes
from twinbench.merging.merged import Merged, materialize
from twinbench.merging.method import Method
from twinbench.routing.layerwise import gated
from twinbench.routing.learned import Setting
from twinbench.system.mistakes import Mistake
from twinbench.tasks.metrics import predictions
from twinbench.weights.parts import LowRank, dense
from twinbench.weights.state_dict import read_checkpoint
from twinbench.workloads.classification.open import classifier
from twinbench.workloads.classification.score import forward, score

TEXTS = ["w0 w1", "w30 w31 w32 w33 w34 w35 w36", "w5", "w9 w20 w39 w2 w14", "unknown words here"]
KEPT = {"rank": 4, "gate_rank": 2, "top_k": 1, "basis": basis}


@pytest.fixture(scope="module")
def states(family):
    """The tiny family's base and experts without heads, whose experts differ from the base by more than 0.05."""

    def backbone(folder):
        found = read_checkpoint(folder)
        names = [n for n in found if not n.startswith("classifier") and "pooler" not in n]
        return {name.removeprefix("bert."): found[name] for name in names}

    base = backbone(family / "base")
    experts = {task: backbone(family / "experts" / task) for task in CLASSES}
    return base, {t: {n: base[n] + 3 * (e[n] - base[n]) for n in base} for t, e in experts.items()}


@pytest.fixture
def model(family, states):
    model = BertForSequenceClassification.from_pretrained(family / "experts" / "colours").eval()
    model.bert.load_state_dict(states[0], strict=False)
    return model


@pytest.fixture
def batch():
    return tokenizer()(TEXTS, padding=True, return_tensors="pt")


def toy(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))


def toy_experts(base: dict, count: int = 3) -> dict:
    torch.manual_seed(9)
    return {f"t{t}": {n: tensor + 0.5 * torch.randn_like(tensor) for n, tensor in base.items()} for t in range(count)}


def slowly(model: nn.Sequential, merged: Merged, x: torch.Tensor) -> torch.Tensor:
    """Every token by itself through layers whose weights are built for it."""
    results = []
    for token in x.flatten(0, -2):
        for place, module in enumerate(model):
            if isinstance(module, nn.Linear):
                name = f"{place}.weight"
                weight, bias = module.weight.clone(), 0 if module.bias is None else module.bias.clone()
                if name in merged.gates:
                    found = merged.gates[name].weights(token)
                    for w, parts in zip(found, merged.exclusive.values(), strict=True):
                        weight += w * dense(parts[name]) if name in parts else 0
                        bias += w * dense(parts[f"{place}.bias"]) if f"{place}.bias" in parts else 0
                token = weight @ token + bias
            else:
                token = module(token)
        results.append(token)
    return torch.stack(results).unflatten(0, x.shape[:-1])


@pytest.mark.parametrize("rank", [1, 3, 100])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@torch.no_grad()
def test_a_forward_is_its_definition(rank, top_k):
    model = toy()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    merged = materialize(smile.merge(base, toy_experts(base), **KEPT | {"rank": rank, "top_k": top_k}))
    x = torch.randn(2, 5, 6)
    plain = model(x)
    with gated(model, merged):
        got = model(x)
    torch.testing.assert_close(got, slowly(model, merged, x), atol=1e-5, rtol=0)
    assert (got - plain).abs().max() > 0.1, "the parts matter here"
    assert torch.equal(model(x), plain), "afterwards the model is the shared one again"
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_experts_of_different_kinds_and_ranks_share_a_layer():
    model = toy()
    torch.manual_seed(4)
    thin = {"0.weight": LowRank(torch.randn(10, 2), torch.randn(2, 6)), "0.bias": torch.randn(10)}
    thick = {"0.weight": LowRank(torch.randn(10, 5), torch.randn(5, 6)), "2.weight": magnitude(torch.randn(4, 10), 0.3)}
    whole = {"0.weight": torch.randn(10, 6), "4.bias": torch.randn(3)}
    gates = {f"{at}.weight": Projections(torch.randn(4, 2, d), 3) for at, d in ((0, 6), (2, 10), (4, 4))}
    merged = Merged({}, {"thin": thin, "none": {}, "thick": thick, "whole": whole}, gates=gates)
    x = torch.randn(7, 6)
    wanted = slowly(model, merged, x)
    assert (wanted - model(x)).abs().max() > 0.1
    with gated(model, merged):
        torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=0)


def only_linear(base: dict, expert: dict) -> dict:
    taken = {part for n, t in base.items() if smile.is_linear(n, t) for part in (n, smile.bias_of(n))}
    return {name: expert[name] if name in taken else tensor for name, tensor in base.items()}


@torch.inference_mode()
def test_one_expert_of_full_rank_is_that_expert(states, model, batch):
    base, experts = states
    expert = only_linear(base, experts["size"])
    merged = materialize(smile.merge(base, {"size": expert}, **KEPT | {"rank": 100}))
    plain = model(**batch).logits
    with gated(model.bert, merged):
        got = model(**batch).logits
    model.bert.load_state_dict(expert, strict=False)
    torch.testing.assert_close(got, model(**batch).logits, atol=1e-5, rtol=0)
    assert (got - plain).abs().max() > 1e-2


@torch.inference_mode()
def test_experts_that_are_the_same_are_that_expert_whatever_the_gate_says(states, model, batch):
    base, experts = states
    expert = only_linear(base, experts["size"])
    for top_k in (1, 3):
        same = dict.fromkeys("abc", expert)
        merged = materialize(smile.merge(base, same, **KEPT | {"rank": 100, "top_k": top_k}))
        model.bert.load_state_dict(base, strict=False)
        with gated(model.bert, merged):
            got = model(**batch).logits
        model.bert.load_state_dict(expert, strict=False)
        torch.testing.assert_close(got, model(**batch).logits, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_the_order_of_experts_does_not_matter(states, model, batch):
    base, experts = states
    found = []
    for order in (list(experts), list(reversed(experts))):
        with gated(model.bert, materialize(smile.merge(base, {t: experts[t] for t in order}, **KEPT))):
            found.append(model(**batch).logits)
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_neither_the_batch_nor_padding_matters(states, model, batch):
    merged = materialize(smile.merge(*states, **KEPT | {"top_k": 2}))
    with gated(model.bert, merged):
        together = model(**batch).logits
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone = model(**{key: value[row : row + 1, :length] for key, value in batch.items()}).logits
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_route_of_a_whole_text_does_not_see_its_padding(states, model, batch):
    """The prototypes are set so that padding, were it counted, would turn some routes."""
    base, experts = states
    parts = materialize(smile.merge(base, experts, **KEPT | {"rank": 100}))
    draw = torch.Generator().manual_seed(1)
    gates = {name: Prototypes(torch.randn(3, base[name].shape[1], generator=draw)) for name in parts.gates}
    whole = Merged(parts.shared, parts.exclusive, gates=gates)
    with gated(model.bert, whole):
        together = model(**batch).logits
        blind = model(**batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}).logits
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone = model(**{key: value[row : row + 1, :length] for key, value in batch.items()}).logits
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)
    assert (blind - together).abs().max() > 1e-3
    given = [batch[name] for name in ("input_ids", "attention_mask")]
    plain = model.bert(*given).last_hidden_state
    with gated(model.bert, whole):
        by_place, by_name = model.bert(*given), model.bert(given[0], attention_mask=given[1])
    torch.testing.assert_close(by_place.last_hidden_state, by_name.last_hidden_state)
    assert (by_place.last_hidden_state - plain).abs().max() > 1e-3


@torch.inference_mode()
def test_the_known_task_can_take_the_place_of_the_gates(family, states):
    """Of full rank, SMILE's parts at the known task are the expert's linear layers in the base."""
    suite = opened(family)
    method = Method("smile", "smile", partial(smile.merge, **KEPT | {"rank": 100}), route="layer")
    own = bench(suite, 5)
    for task, expert in suite.experts.items():
        state = only_linear({name: suite.base[name] for name in suite.base}, expert)
        with own.holding(state) as module:
            wanted = forward(own, classifier(suite, task, module), task, "test")
        _, frame, _, _ = score(own, Setting(method, "task"), task, "test", None)
        classes = suite.tasks[task].classes is not None
        wanted = predictions(wanted.numpy(), classes)
        np.testing.assert_allclose(frame["prediction"], wanted, atol=1e-5)


@torch.inference_mode()
def test_tokens_of_one_text_take_routes_of_their_own(states, model, batch):
    merged, seen = materialize(smile.merge(*states, **KEPT)), []

    class Watched:
        def __init__(self, gate):
            self.gate = gate

        def to(self, device):
            return self

        def weights(self, x, mask=None):
            seen.append(self.gate.weights(x, mask))
            return seen[-1]

    watched = {name: Watched(gate) for name, gate in merged.gates.items()}
    with gated(model.bert, Merged(merged.shared, merged.exclusive, gates=watched)):
        model(**batch)
    assert len(seen) == len(merged.gates) == 12
    assert any(len(weights[1].unique(dim=0)) > 1 for weights in seen)


@pytest.mark.parametrize("autocast", [False, True])
@torch.inference_mode()
def test_in_bfloat16_it_is_near_and_keeps_the_layers_dtype(autocast):
    model = toy()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    merged = materialize(smile.merge(base, toy_experts(base), **KEPT | {"top_k": 3}))
    x = torch.randn(4, 5, 6).bfloat16().float()
    with gated(model, merged):
        wanted = model(x)
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), gated(model, merged):
        got = model(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, atol=0.05, rtol=0.02)


@torch.inference_mode()
def test_a_causal_model_scores_and_generates_whatever_its_batch():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).eval()
    base = {n: t.clone() for n, t in model.model.state_dict(prefix="model.").items()}
    experts = toy_experts(base)
    merged = materialize(smile.merge(base, experts, **KEPT | {"top_k": 2}))
    rows, plain = prompts(), generated(model, left_padded(prompts()), min_new_tokens=NEW)
    with gated(model, merged):
        together = generated(model, left_padded(rows), min_new_tokens=NEW)
        scores = log_likelihoods(model, left_padded(rows))
        for at, row in enumerate(rows):
            alone = left_padded([row])
            assert torch.equal(generated(model, alone, min_new_tokens=NEW)[0], together[at])
            own = scores[at, 1 - row.shape[1] :]
            torch.testing.assert_close(log_likelihoods(model, alone)[0], own, atol=1e-4, rtol=0)
    assert not torch.equal(plain, together)


class Named(nn.Module):
    """Calls its layer by the argument's name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 10)

    def forward(self, x):
        return self.layer(input=x)


class Uncalled(Named):
    """Reads its layer's weight and does not call the layer."""

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def one_part(name: str, *shape: int, **further) -> Merged:
    return Merged(
        {}, {"t": {name: torch.ones(shape)}}, gates={name: Projections(torch.randn(1, 1, shape[1]), 1)} | further
    )


@torch.no_grad()
def test_an_input_that_is_given_by_name_is_routed():
    model, x = Named(), torch.randn(2, 6)
    wanted = model(x) + x.sum(1, keepdim=True)
    with gated(model, one_part("layer.weight", 10, 6)):
        torch.testing.assert_close(model(x), wanted)


def refused(words: str):
    return pytest.raises(Mistake, match=re.escape(words))


def test_a_layer_that_is_read_and_not_called_is_an_error():
    model = Uncalled()
    with gated(model, one_part("layer.weight", 10, 6)), refused("Uncalled ran without calling layer.weight"):
        model(torch.randn(2, 6))
    attention, x = nn.MultiheadAttention(8, 2), torch.randn(3, 2, 8)
    words = "MultiheadAttention ran without calling out_proj.weight, so the parts there were left out"
    with gated(attention, one_part("out_proj.weight", 8, 8)), refused(words):
        attention(x, x, x)
    assert attention(x, x, x)[0].shape == x.shape, "no hook is left"
    both = nn.Sequential(Named(), nn.Tanh(), nn.Linear(10, 6), Uncalled())
    parts = {name: torch.ones(10, 6) for name in ("0.layer.weight", "3.layer.weight")}
    merged = Merged({}, {"t": parts}, gates={name: Projections(torch.randn(1, 1, 6), 1) for name in parts})
    with gated(both, merged), refused("without calling 3.layer.weight, so"):
        both(torch.randn(2, 6))


def test_what_no_gate_weighs_is_refused_by_name():
    model, gate = toy(), Projections(torch.randn(1, 1, 6), 1)
    for name, shape in (("2.weight", (4, 10)), ("4.bias", (3,)), ("0.scale", (10,))):
        merged = Merged({}, {"letters": {name: torch.ones(shape)}}, gates={"0.weight": gate})
        with refused(f"exclusive part {name} of letters has no gate"), gated(model, merged):
            pass


def test_a_gate_of_what_is_no_linear_layer_is_refused():
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 5, bias=False))
    with refused("gate 0.weight belongs to Embedding"), gated(model, one_part("0.weight", 5, 6)):
        pass
    with refused("gate 2.weight belongs to no parameter"), gated(model, one_part("2.weight", 5, 6)):
        pass
    model[1].weight = model[0].weight
    with refused("that is 0.weight, too"), gated(model, one_part("1.weight", 5, 6)):
        pass


def test_a_gate_must_know_every_expert():
    model, part = toy(), torch.ones(10, 6)
    gates = {"0.weight": Projections(torch.randn(3, 1, 6), 1)}
    merged = Merged({}, {"a": {"0.weight": part}, "b": {"0.weight": part}}, gates=gates)
    words = r"of shape \(4, 2\), one per expert, got \(4, 3\)"
    with gated(model, merged), pytest.raises(ValueError, match=words):
        model(torch.randn(4, 6))


def test_a_layer_with_a_gate_and_no_parts_need_not_run():
    model, x = Uncalled(), torch.randn(2, 6)
    with gated(model, Merged({}, {"t": {}}, gates={"layer.weight": Projections(torch.randn(1, 1, 6), 1)})):
        assert model(x).shape == (2, 10)
