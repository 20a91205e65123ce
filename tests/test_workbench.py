"""What a sweep's runs share: values within a limit of bytes, one module that holds one state, merges made once."""

import random
from dataclasses import dataclass, replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from baselines import average, expert, individual
from support.family import bench, opened
from support.routing import STATIC
from twinbench import workbench
from twinbench.merging.merged import Merged, exclusive_kind
from twinbench.merging.method import Method
from twinbench.routing.learned import Setting
from twinbench.weights.parts import LowRank, dense
from twinbench.weights.state_dict import StateDict
from twinbench.workbench import Workbench, held_bytes, merged


def empty(limit: int) -> Workbench:
    return Workbench(None, "cpu", 8, limit, "float32")


def value(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


@pytest.fixture
def tiny(family) -> Workbench:
    return bench(opened(family))


def test_a_value_is_made_once_and_found_under_its_key_alone():
    own, made = empty(100), []
    for key in ("a", "b", "a", ("a", 1), "b"):
        found = own.remember(key, lambda key=key: made.append(key) or [key])
        assert found == [key] and own.remember(key, list) is found
    assert made == ["a", "b", ("a", 1)]


def test_none_is_a_value_and_an_error_is_none():
    own, made = empty(100), []
    for _ in range(2):
        assert own.remember("nothing", lambda: made.append(1)) is None
    assert made == [1]
    with pytest.raises(ZeroDivisionError):
        own.remember("error", lambda: 1 / 0)
    assert own.remember("error", lambda: 5) == 5


@pytest.mark.parametrize("limit", [0, 9, 10, 60, 1000])
def test_values_stay_within_the_limit_and_the_least_recently_used_go_first(limit):
    """Against a list in order of use, from whose front values go while they are too many and not alone."""
    draw, own, kept = random.Random(limit), empty(limit), []
    sizes = {key: draw.choice([1, 5, 10, 25, 70]) for key in range(12)}
    for _ in range(300):
        key, made = draw.choice(list(sizes)), []
        own.remember(key, lambda key=key, made=made: made.append(key) or value(sizes[key]))
        assert bool(made) == (key not in kept)
        kept = [other for other in kept if other != key] + [key]
        while len(kept) > 1 and sum(sizes[other] for other in kept) > limit:
            del kept[0]
        assert own.remembered_bytes() == sum(sizes[other] for other in kept)
        assert own.remembered_bytes() <= limit or kept == [key]


def test_a_value_larger_than_the_limit_is_kept_until_the_next_comes():
    own = empty(10)
    own.remember("small", lambda: value(3))
    large = own.remember("large", lambda: value(50))
    assert own.remember("large", list) is large and own.remembered_bytes() == 50
    own.remember("next", lambda: value(4))
    assert own.remembered_bytes() == 4


def test_what_a_value_asks_for_while_it_is_made_is_remembered_too():
    own = empty(100)
    found = own.remember("outer", lambda: [own.remember("inner", lambda: value(7))])
    assert own.remember("inner", list) is found[0]


@dataclass
class Pair:
    left: object
    right: object


TENSOR = torch.zeros(6, 4)
ONE = 6 * 4 * 4
FRAME = pd.DataFrame({"row": [1, 2], "text": ["one", "three"]})


@pytest.mark.parametrize(
    ("held", "size"),
    [
        (TENSOR, ONE),
        (TENSOR[1:3], ONE),  # a view keeps all of its storage in memory
        (TENSOR.half(), ONE // 2),
        ([TENSOR, TENSOR, TENSOR[0]], ONE),
        ((TENSOR, {"again": TENSOR.T}), ONE),
        ([TENSOR, TENSOR.clone()], 2 * ONE),
        (Pair(TENSOR, [TENSOR, torch.zeros(5)]), ONE + 20),
        (
            Merged({"w": TENSOR}, {"a": {"w": LowRank(torch.zeros(6, 1), torch.zeros(1, 4))}}, ({"w": TENSOR},)),
            ONE + 40,
        ),
        (StateDict(["w"], lambda _: TENSOR), 0),  # read on access
        (np.zeros((3, 2)), 48),
        (FRAME, int(FRAME.memory_usage(deep=True).sum())),
        (nn.Linear(4, 6), ONE + 24),
        ("four", 4),
        (list(range(100)), 800),
        ([], 0),
        ((TENSOR, 1.5), ONE + 8),
        (None, 8),
    ],
    ids=lambda case: type(case).__name__,
)
def test_bytes_are_those_of_what_is_held(held, size):
    assert held_bytes(held, set()) == size


def test_a_tied_weight_of_a_module_counts_once():
    module = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    assert held_bytes(module, set()) == 2 * 256
    module[1].weight = module[0].weight
    assert held_bytes(module, set()) == 256


def test_the_module_holds_the_state_and_keeps_what_the_state_lacks(tiny):
    experts = tiny.suite.experts
    with torch.no_grad():
        tiny.module.pooler.dense.weight.fill_(3.0)  # a head that no state has
    for state in (experts["letters"], experts["size"], tiny.suite.base):
        with tiny.holding(dict(state)) as module:
            found = module.state_dict()
            assert module is tiny.module and all(torch.equal(found[name], state[name]) for name in state)
            assert (found["pooler.dense.weight"] == 3).all() and "pooler.dense.weight" not in state
    with tiny.holding(None) as module:
        assert torch.equal(module.state_dict()["embeddings.LayerNorm.bias"], state["embeddings.LayerNorm.bias"])


def test_two_workbenches_of_one_suite_have_a_module_each(tiny):
    other = bench(tiny.suite)
    with tiny.holding(dict(tiny.suite.experts["size"])), other.holding(dict(tiny.suite.base)):
        name = "encoder.layer.0.output.dense.weight"
        assert torch.equal(tiny.module.state_dict()[name], tiny.suite.experts["size"][name])
        assert torch.equal(other.module.state_dict()[name], tiny.suite.base[name])


@pytest.mark.parametrize("second", [None, "size"])
def test_a_second_state_while_one_is_held_is_an_error(tiny, second):
    first, name = tiny.suite.experts["letters"], "encoder.layer.1.output.dense.weight"
    with tiny.holding(dict(first)) as module:
        with (
            pytest.raises(RuntimeError, match="holds one state at a time"),
            tiny.holding(second and dict(tiny.suite.experts[second])),
        ):
            raise AssertionError("it is refused before anything runs")
        assert torch.equal(module.state_dict()[name], first[name]), "the first is held as before"
        with pytest.raises(RuntimeError, match="holds one state"), tiny.holding(None):
            pass  # a refused state has not let the first one go
    with tiny.holding(None):
        pass


def test_the_module_is_free_after_an_error(tiny):
    with pytest.raises(ZeroDivisionError), tiny.holding(None):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="lacks"), tiny.holding({}):
        pass
    with tiny.holding(dict(tiny.suite.base)):
        pass


def test_names_and_shapes_that_do_not_fit_are_named(tiny):
    whole, name = dict(tiny.suite.base), "encoder.layer.0.output.dense.bias"
    without = {other: tensor for other, tensor in whole.items() if other != name}
    for state, said in (
        (without, rf"BertModel lacks {name} or has no"),
        (whole | {"decoder.weight": torch.ones(2)}, r"has no decoder\.weight"),
        (whole | {name: torch.ones(17)}, rf"size mismatch for {name}"),
    ):
        with pytest.raises(RuntimeError, match=said), tiny.holding(state):
            pass


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_weight_is_in_a_state_under_one_name(tied):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, tie_word_embeddings=tied, **sizes))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = bench(SimpleNamespace(base=base, workload=SimpleNamespace(module=lambda suite, device: model)))
    state = {name: tensor + 1 for name, tensor in base.items() if name != "lm_head.weight"}
    if not tied:
        with pytest.raises(RuntimeError, match=r"lacks lm_head\.weight"), own.holding(state):
            pass
        return
    with own.holding(state) as module:
        assert torch.equal(module.lm_head.weight, state["model.embed_tokens.weight"])


def test_a_merge_is_made_once_per_key_and_whose_biases_it_has(tiny):
    calls = []

    def merge(base, experts):
        calls.append(list(base))
        return average.merge(base, experts)

    first, again = Method("key", "one", merge), Method("key", "of another name", merge)
    whole, seconds = merged(tiny, first, False)
    assert merged(tiny, again, False)[0] is whole and seconds >= 0
    assert whole.shared.keys() == tiny.suite.base.keys()
    slim, _ = merged(tiny, first, True)
    assert len(calls) == 2 and merged(tiny, again, True)[0] is slim
    assert slim.shared.keys() == {name for name in tiny.suite.base if "bias" not in name}
    assert calls[1] == list(slim.shared), "in the base's order"
    assert merged(tiny, Method("other", "one", merge), False)[0] is not whole and len(calls) == 3
    for name, tensor in slim.shared.items():
        assert torch.equal(tensor, whole.shared[name])


def test_methods_beside_one_shared_expert_merge_that_once_and_count_its_seconds(tiny, monkeypatch):
    """By a clock that goes on by one each time that it is looked at."""
    monkeypatch.setattr(workbench, "time", SimpleNamespace(perf_counter=count().__next__))
    asked, given = [], []
    shared = Method("shared", "expert", lambda b, e: asked.append(1) or expert.merge(b, e, task="size"))

    def beside(base, experts, shared):
        given.append(shared)
        return Merged(shared)

    for key in ("one", "two"):
        found, seconds = merged(tiny, Method(key, key, beside, shared=shared), False)
        assert seconds == 2, "its own and the shared expert's"
        assert torch.equal(found.shared["embeddings.LayerNorm.bias"], given[0]["embeddings.LayerNorm.bias"])
    assert len(asked) == 1 and given[0] is given[1] is merged(tiny, shared, False)[0].shared
    assert merged(tiny, shared, False)[1] == 1
    assert torch.equal(given[0]["embeddings.LayerNorm.bias"], tiny.suite.experts["size"]["embeddings.LayerNorm.bias"])


def test_what_is_always_added_counts_wherever_a_merge_is_used(tiny):
    """A static method, one that goes by the task, and the shared expert of another: each as if it were in `shared`."""
    moved = tiny.suite.experts["size"]

    def apart(base, experts):
        return Merged(base, always=({name: moved[name] - base[name] for name in base},))

    def together(base, experts):
        return Merged({name: base[name] + (moved[name] - base[name]) for name in base})

    def twin(base, experts, shared):
        own = {task: {name: 0.5 * (expert[name] - shared[name]) for name in base} for task, expert in experts.items()}
        return Merged(shared, own)

    found = {}
    for key, merge in (("apart", apart), ("together", together)):
        static = Method(key, key, merge)
        beside = Method(f"{key} and parts", key, twin, route="task", shared=static)
        for method, route in ((static, None), (beside, "task")):
            setting = Setting(method, route, None, None)
            _, frame, _, _ = tiny.suite.workload.score(tiny, setting, "size", "test", None)
            found[key, route] = frame["prediction"].to_numpy()
    bare = Setting(Method("base", "base", lambda base, experts: Merged(base)), None, None, None)
    without = tiny.suite.workload.score(tiny, bare, "size", "test", None)[1]["prediction"].to_numpy()
    for route in (None, "task"):
        assert found["apart", route] == pytest.approx(found["together", route], abs=1e-5)
        assert abs(found["apart", route] - without).max() > 1e-3


def test_dense_matrices_of_the_experts_are_not_kept(tiny):
    found, _ = merged(tiny, Method("individual", "individual", individual.merge, route="task"), False)
    vectors = 4 * sum(
        t.numel() for own in found.exclusive.values() for t in own.values() if isinstance(t, torch.Tensor)
    )
    assert held_bytes(found, set()) - held_bytes(found.shared, set()) < vectors + 100 * len(found.shared)
    base, name = tiny.suite.base, "encoder.layer.0.output.dense.weight"
    for task, own in tiny.suite.experts.items():
        assert torch.equal(dense(found.exclusive[task][name]), own[name] - base[name])
    assert exclusive_kind(found) == "dense"


def test_a_suite_of_factors_asks_for_a_methods_factored_form(tiny):
    def form(base, adapters):
        assert base is tiny.suite.base and adapters is tiny.suite.experts
        return Merged(base)

    slim = bench(replace(tiny.suite, factored=True))
    method = Method("form", "form", None, factored=form)
    found, seconds = merged(slim, method, False)
    assert found.shared is tiny.suite.base and seconds >= 0
    with pytest.raises(ValueError, match="static has no factored form"):
        merged(slim, replace(STATIC, key="none", name="static", route="task"), False)
