"""``precision=bfloat16``: the encoder computes in it, static or routed; weights, heads and outputs stay float32."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baselines import individual
from support.commands import command, composed, planned, read, rows_of
from support.family import CLASSES, bench, opened
from support.routing import recipe
from twinbench.command import run
from twinbench.merging import twin_merging
from twinbench.merging.compress import basis
from twinbench.merging.method import Method
from twinbench.plan import preflight
from twinbench.prepared import fisher, gram
from twinbench.routing import learned
from twinbench.routing.learned import Setting
from twinbench.system import device
from twinbench.workbench import single

TWIN = {"compression": "svd", "rank_ratio": 0.5, "density": None, "basis": basis}


@pytest.fixture
def benches(family, monkeypatch, tmp_path) -> dict:
    monkeypatch.setenv("TWINBENCH_CACHE", str(tmp_path))
    return {precision: bench(opened(family), 8, precision) for precision in device.PRECISIONS}


def logits(own, setting, task):
    from twinbench.workloads.classification.score import _forward

    return _forward(own, setting, task, "test")[0]


@pytest.mark.parametrize("route", ["task", "router"])
def test_the_encoder_computes_in_bfloat16_and_the_head_in_float32(benches, route):
    static = Method("average", "average", lambda b, e: individual.merge(b, {"size": e["size"]}))
    twin = Method(
        "twin",
        "twin",
        lambda b, e, shared: twin_merging.merge(b, e, shared=shared, seed=0, **TWIN),
        route="router",
        shared=static,
    )
    setting = Setting(twin, route, recipe(), 0)
    found, seen = {}, {}
    for precision, own in benches.items():
        layer = own.module.encoder.layer[0].output.dense
        layer.register_forward_hook(lambda _, given, out, p=precision: seen.update({p: out.dtype}))
        found[precision] = {task: logits(own, setting, task) for task in CLASSES}
        assert {p.dtype for p in own.module.parameters()} == {torch.float32}
    assert seen == {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for task in CLASSES:
        one, other = found["float32"][task], found["bfloat16"][task]
        assert other.dtype == torch.float32 and not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0, atol=0.2 * one.abs().max().item())
    values = torch.cat([found["bfloat16"][task].flatten() for task in CLASSES])
    assert not torch.equal(values, values.bfloat16().float()), "logits of a float32 head are no multiples of 1/256"


def test_what_a_router_and_a_method_read_is_of_the_same_precision(benches):
    reads = {}
    setting = Setting(Method("base", "base", lambda b, e: individual.merge(b, {})), None, recipe(), 0)
    for precision, own in benches.items():
        hidden, _ = learned._features(own, setting, "size", "test", None)
        statistics = [argument.prepare(own)("size", 5) for argument in (fisher, gram)]
        reads[precision] = [hidden, *(found["encoder.layer.1.output.dense.weight"] for found in statistics)]
    for one, other in zip(*reads.values(), strict=True):
        assert one.dtype == other.dtype == torch.float32 and not torch.equal(one, other)
        assert (one - other).norm() < 0.1 * one.norm()


def test_an_error_in_the_module_leaves_autocast(benches):
    own = benches["bfloat16"]
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        own.module(input_ids=torch.tensor([[10**6]]))
    assert not torch.is_autocast_enabled("cpu")
    with own.holding(None) as module:
        assert module(input_ids=torch.tensor([[1, 2]])).last_hidden_state.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_outputs_of_any_shape_become_float32():
    half = torch.ones(2, dtype=torch.bfloat16)
    found = single({"a": half, "b": (half, [half, None]), "c": torch.ones(1, dtype=torch.int64), "d": "word"})
    assert found["a"].dtype == found["b"][0].dtype == found["b"][1][0].dtype == torch.float32
    assert found["b"][1][1] is None and found["c"].dtype == torch.int64 and found["d"] == "word"


def test_it_counts_in_the_id_unless_it_is_float32():
    plain, other = planned("method=average"), planned("method=average", "precision=bfloat16")
    assert plain.run_id == planned("method=average", "precision=float32").run_id != other.run_id
    assert plain.suite_id == other.suite_id and other.identity()["precision"] == "bfloat16"
    assert other.label.endswith(" precision=bfloat16")
    config, _ = read("suite=demo", "precision=bfloat")
    with pytest.raises(ValueError, match="unknown precision 'bfloat'; did you mean 'bfloat16'"):
        preflight.settings(config)


def test_a_machine_that_would_emulate_it_refuses(family, monkeypatch, tmp_path):
    asked = composed(family / "conf", tmp_path / "results", "method=average", "precision=bfloat16")
    monkeypatch.setattr(device, "_features", lambda: {"avx2", "avx512f"})
    refused = run(asked)
    assert refused.status == "failed"
    (row,) = rows_of(tmp_path / "results")
    assert re.search(r"precision=bfloat16: .* computes in it by emulation; use precision=float32", row["error"])
    assert run(composed(family / "conf", tmp_path / "results", "method=average")).status == "ok", "in float32"
    monkeypatch.setattr(device, "_features", lambda: {"avx512_bf16"})
    assert run(asked).status == "ok"


def test_a_model_whose_weights_are_in_bfloat16_has_no_other_precision():
    given = "suite=generative_smollm", "suite.dtype=bfloat16", "precision=bfloat16", "plan=true"
    refused = command(*given)
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: precision=bfloat16: the model computes in suite.dtype=bfloat16; leave precision out\n"
    )


class Casts(TorchDispatchMode):
    """Counts how often tensors of the shapes of weights were cast to bfloat16."""

    def __init__(self, module):
        super().__init__()
        self.shapes = {weight.shape for weight in module.parameters() if weight.dim() == 2}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.count += args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


def test_a_weight_is_cast_once_while_a_state_answers_and_anew_for_the_next_state(benches):
    own = benches["bfloat16"]
    states = [own.suite.base, own.suite.experts["size"], own.suite.base]
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}

    def passes(hold, state) -> tuple[list[torch.Tensor], int]:
        with torch.no_grad(), hold(state) as module, Casts(module) as casts:
            return [module(**batch).last_hidden_state for _ in range(3)], casts.count

    for state in states:
        (plain, each), (kept, once) = passes(own.holding, state), passes(own.answering, state)
        assert each == 3 * once > 0
        for one, other in zip(plain, kept, strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(passes(own.answering, states[0])[0][0], passes(own.answering, states[1])[0][0])


def test_a_task_is_scored_with_one_cast_of_each_weight(family, monkeypatch, tmp_path):
    monkeypatch.setenv("TWINBENCH_CACHE", str(tmp_path))
    setting = Setting(Method("base", "base", lambda b, e: individual.merge(b, {})), None, None, 0)
    counts = []
    for size in (1, 100):
        own = bench(opened(family), size, "bfloat16")
        with Casts(own.module) as casts:
            logits(own, setting, "size")
        counts.append(casts.count)
    assert counts[0] == counts[1] > 0
