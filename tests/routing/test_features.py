"""What the router reads: hidden states of any layer, pooled over a row's tokens, against a row-by-row reference."""

import json
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from support.family import CLASSES, WORDS, bench, make_task, opened
from support.routing import STATIC, recipe
from twinbench import benchmark
from twinbench.merging.merged import Merged
from twinbench.merging.method import Method
from twinbench.protocol import PROTOCOLS
from twinbench.routing import learned
from twinbench.routing.features import characters, hidden_states
from twinbench.routing.learned import Setting
from twinbench.routing.mlp import Layers
from twinbench.routing.router import Router, grouped
from twinbench.workbench import Workbench

DRAW = np.random.default_rng(0)
LAST = {"layer": None, "pool": "mean"}


def pairs(rows: int):
    texts = {name: [" ".join(DRAW.choice(WORDS, DRAW.integers(1, 7))) for _ in range(rows)] for name in ("one", "two")}
    return pd.DataFrame(texts | {"label": [0, 1] * (rows // 2)})


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch, tmp_path):
    """No states from another test or an earlier day."""
    monkeypatch.setenv("TWINBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny(family) -> Workbench:
    """Two tasks of one text, and one of two."""
    frames = {"train": pairs(40), "test": pairs(10)}
    tasks = {task: make_task(task) for task in CLASSES}
    tasks["letters"] = make_task("letters", frames, columns=["one", "two"])
    return bench(opened(family, tasks=tasks))


def setting(method: Method = STATIC, **changes) -> Setting:
    """Where a router of seed 0 is asked; `changes` are of its recipe."""
    return Setting(method, "router", recipe(**changes), 0)


@torch.inference_mode()
def reference(tiny, task, layer, pool, row):
    """One row, alone and unpadded, through the whole model."""
    spec = tiny.suite.tasks[task]
    texts = [spec.splits["test"][column][row] for column in spec.columns]
    batch = tiny.suite.tokenizer(*texts, truncation=True, max_length=16, return_tensors="pt")
    states = tiny.module(**batch, output_hidden_states=True).hidden_states
    hidden = states[-1 if layer is None else layer][0]
    if pool == "segments":
        ids = batch.sequence_ids(0)
        halves = [hidden[[at for at, column in enumerate(ids) if column == which]] for which in (0, 1)]
        return torch.cat([half.mean(0) if len(half) else torch.zeros(hidden.shape[1]) for half in halves])
    return {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pool]


@pytest.mark.parametrize("pool", ["mean", "first", "last", "segments"])
@pytest.mark.parametrize("layer", [None, 0, 1, 2])
def test_features_are_the_layers_hidden_states_pooled(tiny, layer, pool):
    tiny.batch_size = 4
    with tiny.holding(dict(tiny.suite.base)):
        for task in ("letters", "colours"):
            found = hidden_states(tiny, task, "test", layer=layer, pool=pool)
            wanted = torch.stack([reference(tiny, task, layer, pool, row) for row in range(10)])
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
            some = hidden_states(tiny, task, "test", layer=layer, pool=pool, rows=3)
            torch.testing.assert_close(some, wanted[:3], atol=1e-5, rtol=0)


def test_layers_that_are_not_read_are_not_run(tiny):
    ran = []
    for at, layer in enumerate(tiny.module.encoder.layer):
        layer.register_forward_hook(lambda *_, at=at: ran.append(at))
    hidden_states(tiny, "size", "test", layer=1, pool="mean", rows=4)
    assert ran == [0]
    hidden_states(tiny, "size", "test", **LAST, rows=4)
    assert ran == [0, 0, 1], "the module is whole again"


def test_a_layer_that_is_not_there_is_refused(tiny):
    with pytest.raises(ValueError, match=r"router\.features\.layer must be in \[0, 2\] or null, got 3"):
        hidden_states(tiny, "size", "test", layer=3, pool="mean")


def test_a_router_is_trained_on_held_out_rows_or_on_so_many_training_rows(tiny):
    for rows, sizes in ((None, (4, 1)), (7, (7, 5)), (500, (20, 5))):
        train, held_out, _ = learned._examples(tiny, setting(rows=rows), "size")
        assert (len(train), len(held_out)) == sizes
        with tiny.holding(dict(tiny.suite.base)):
            read = hidden_states(tiny, "size", "validation" if rows is None else "train", **LAST, rows=sizes[0])
        assert torch.equal(train, read)


def test_the_base_is_read_where_the_router_says_so(tiny):
    """The same routes whatever the shared expert is, and other ones where it is read."""
    routes = {}
    for source in ("base", "shared"):
        for task in ("letters", "size"):
            made = Method(task, task, lambda base, experts, own=tiny.suite.experts[task]: Merged(own))
            routes[source, task] = learned.weights(tiny, setting(made, source=source), "colours", "test")[0]
    assert routes["base", "letters"] is routes["base", "size"], "and found once for all of them"
    assert not torch.equal(routes["shared", "letters"], routes["shared", "size"])
    for source in ("shared", "base"):
        asked = [replace(setting(made, source=source), gold_biases=gold) for gold in (False, True)]
        first, second = (learned.weights(tiny, each, "colours", "test")[0] for each in asked)
        assert (first is second) == (source == "base"), "the base has the same biases under every protocol"


def test_what_is_read_is_the_shared_experts_and_not_the_methods(tiny):
    """A method beside a shared expert shares its routes with every other method beside it."""
    routes = []
    for key in ("one", "two"):
        made = Method(key, key, None, route="router", shared=STATIC)
        routes.append(learned.weights(tiny, setting(made), "colours", "test")[0])
    assert routes[0] is routes[1] is learned.weights(tiny, setting(STATIC), "colours", "test")[0]


def test_hidden_states_are_read_in_the_merged_model(tiny):
    """Under the weights that the shared expert has, whatever the module held before."""
    expert = dict(tiny.suite.experts["letters"])
    made = Method("letters", "letters", lambda base, experts: Merged(expert))
    with tiny.holding(expert):
        wanted = hidden_states(tiny, "size", "test", **LAST)
    with tiny.holding(dict(tiny.suite.base)):
        pass
    found, _ = learned._features(tiny, setting(made), "size", "test")
    assert torch.equal(found, wanted)


def test_a_router_is_trained_once_for_all_ways_to_use_it(tiny):
    ways = ({}, {"groups": 2}, {"tolerance": 0.1}, {"top_k": 1})
    routers = [learned.learned(tiny, setting(**use))[0] for use in ways]
    assert all(router.model is routers[0].model for router in routers)
    assert learned.learned(tiny, replace(setting(), seed=1))[0].model is not routers[0].model


def test_seconds_are_those_of_what_was_read_and_trained(tiny, monkeypatch):
    """By a clock that goes on by one each time that it is looked at: hidden states and characters take one each."""
    monkeypatch.setattr(learned, "time", SimpleNamespace(perf_counter=count().__next__))
    for rows, split in ((None, 1), (7, 2)):
        asked = setting(characters=8, rows=rows)
        assert learned.learned(tiny, asked)[1] == len(CLASSES) * 2 * split + 1
        assert learned.weights(tiny, asked, "size", "test")[1] == 3


def test_weights_are_of_the_known_task_or_of_the_routers_choice(tiny):
    soft, _ = learned.weights(tiny, setting(), "colours", "test")

    def applied(route):
        return learned.applied(tiny, replace(setting(), route=route), "colours", "test")

    assert torch.equal(applied("router"), soft)
    assert applied(None) is None and applied("layer") is None
    assert torch.equal(applied("top1"), torch.nn.functional.one_hot(soft.argmax(1), 3).float())
    assert applied("task").tolist() == [[0, 1, 0]] * 10


def test_groups_are_of_the_routers_logits(tiny):
    plain, _ = learned.weights(tiny, setting(), "size", "test")
    router, _ = learned.learned(tiny, setting())
    logits = router.logits(learned._features(tiny, setting(), "size", "test")[0])
    found, _ = learned.weights(tiny, setting(groups=2), "size", "test")
    assert torch.equal(found, grouped(plain, logits, 2, 0))


def test_one_held_out_row_cannot_train_a_router(family):
    rows = {task: {"train": 20, "validation": 1 if task == "size" else 2, "test": 5} for task in CLASSES}
    tiny = bench(opened(family, tasks={task: make_task(task, rows=rows[task]) for task in CLASSES}))
    with pytest.raises(ValueError, match=r"task size has 1 held-out row.*suite\.tasks\.size\.rows\.validation"):
        learned.learned(tiny, setting())
    router, _ = learned.learned(tiny, setting(rows=7))
    assert router.model.logits[-1].out_features == 3


LAYER = {layer: f"encoder.layer.{layer}." for layer in (0, 1)}


@pytest.mark.parametrize("head", ["pooler", "classifier"])
def test_a_router_is_stored_with_what_it_reads_beside_the_shared_model(family, tmp_path, head):
    """The size of a file that holds both, layer by layer; the embeddings' matrices are frozen here."""
    tiny, written = bench(opened(family, head)), tmp_path / "router.safetensors"
    suite = tiny.suite
    shared = {name: t if "_embeddings" in name else t + 1 for name, t in suite.base.items()}
    no_biases = {name: tensor for name, tensor in shared.items() if "bias" not in name}
    moved = [name for name in shared if "_embeddings" not in name and not name.startswith("pooler")]
    below = [name for name in moved if not name.startswith(LAYER[1])]
    biases = [name for name in moved if "bias" in name]
    assert len(moved) > len(below) > 2 and all(name.startswith((LAYER[0], "embeddings.LayerNorm")) for name in below)
    for reads, stored, beside in (
        ({"source": "base"}, shared, moved),
        ({"source": "base", "layer": 2}, shared, moved),
        ({"source": "base", "layer": 1}, shared, below),
        ({"source": "base", "layer": 0}, shared, ["embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"]),
        ({"source": "base"}, no_biases, moved),
        ({"source": "base"}, dict(suite.base), []),
        ({"source": "shared"}, shared, []),
        ({"source": "shared"}, no_biases, biases),
        ({"source": None, "characters": 8}, shared, []),
    ):
        asked = setting(**reads)
        router = Router(Layers(16, 3, asked.router.model), asked.router.use)
        save_file(router.model.state_dict() | {f"base.{name}": suite.base[name] for name in beside}, written)
        assert learned.router_bytes(tiny, asked, router, stored) == written.stat().st_size, (reads, beside)
    save_file(router.model.state_dict(), written)
    slim = bench(replace(suite, factored=True))  # whose base is stored whole
    assert learned.router_bytes(slim, setting(source="base"), router, shared) == written.stat().st_size


def test_settings_of_how_weights_are_used_reach_the_trained_router(tiny):
    for top_k in (1, 2):
        found, _ = learned.weights(tiny, setting(top_k=top_k), "size", "test")
        assert (found > 0).sum(1).tolist() == [top_k] * 10


def spaced(rows: int, blank: bool):
    """Texts that a tokenizer reads alike, with and without blanks before punctuation."""
    texts = [" ".join(DRAW.choice(WORDS, 5)) + (" ." if blank else ".") for _ in range(rows)]
    return pd.DataFrame({"text": texts, "label": [0, 1] * (rows // 2)})


def test_characters_tell_apart_what_the_tokenizer_reads_alike(family):
    frames = {blank: {"train": spaced(320, blank), "test": spaced(40, blank)} for blank in (True, False)}
    rows = {"rows": {"train": 300, "validation": 20, "test": None}}
    tasks = {
        "letters": make_task("letters", frames[True], **rows),
        "colours": make_task("colours", frames[False], **rows),
    }
    tiny, accuracy = bench(opened(family, tasks=tasks)), {}
    for name, reads in {"hidden": {}, "text": {"source": None, "characters": 1024}}.items():
        asked = setting(epochs=15, lr=1e-3, hidden_ratio=0.1, rows=300, **reads)
        hits = [
            learned.weights(tiny, asked, task, "test")[0].argmax(1) == position for position, task in enumerate(tasks)
        ]
        accuracy[name] = torch.cat(hits).float().mean()
    assert accuracy["text"] > 0.95 and accuracy["hidden"] < 0.7, accuracy


def test_characters_are_counted_per_column(tiny):
    width, tasks = 64, tiny.suite.tasks
    pairs, single = (characters(tasks[task], "test", width, None) for task in ("letters", "colours"))
    assert pairs.shape == single.shape == (10, 2 * width)
    torch.testing.assert_close(pairs.view(20, width).square().mean(1), torch.ones(20))
    assert not single[:, width:].any() and (single >= 0).all()
    assert torch.equal(characters(tasks["letters"], "test", width, 4), pairs[:4])
    first = tasks["letters"].splits["test"]["one"][0]
    grams = {first[at : at + n] for n in range(1, 5) for at in range(len(first) - n + 1)}
    assert 0 < (pairs[0, :width] > 0).sum() <= min(width, len(grams))


def test_hidden_states_and_characters_are_read_beside_each_other(tiny):
    both, seconds = learned._features(tiny, setting(characters=32), "size", "test")
    assert both.shape == (10, 16 + 64) and seconds > 0
    assert torch.equal(both[:, 16:], characters(tiny.suite.tasks["size"], "test", 32, None))


@pytest.fixture
def passes(monkeypatch) -> list:
    """The splits that hidden states are computed of."""
    found = []

    def counted(bench, task, split, **reads):
        found.append((task, split))
        return hidden_states(bench, task, split, **reads)

    monkeypatch.setattr(learned, "hidden_states", counted)
    return found


READS = {"source": "base", "layer": 1, "pool": "segments", "rows": 20}


def trained(family, tasks, *, reads=READS, bench=bench, **changes):
    """What a router reads of each task's training rows in a new process, and the seconds."""
    fresh = bench(replace(opened(family, tasks=tasks), **changes))
    return {task: learned._features(fresh, setting(**reads), task, "train", reads["rows"]) for task in tasks}


def test_what_the_base_makes_of_training_rows_is_kept_for_other_suites(family, passes):
    tasks = {task: make_task(task) for task in CLASSES}
    first = trained(family, tasks)
    assert passes == [(task, "train") for task in CLASSES]
    again = trained(family, dict(reversed(tasks.items())))
    assert len(passes) == len(CLASSES)
    for task in tasks:
        assert torch.equal(first[task][0], again[task][0]) and first[task][1] > 0 and np.isnan(again[task][1])
    size = {"size": tasks["size"]}
    moved = {
        name: tensor + 1 if name.startswith("encoder.layer.1") else tensor
        for name, tensor in opened(family).base.items()
    }
    trained(family, size, base=moved)  # layer 1 is not read
    assert len(passes) == len(CLASSES)


OTHERS = {
    "layer": {"reads": READS | {"layer": 0}},
    "pool": {"reads": READS | {"pool": "mean"}},
    "rows": {"reads": READS | {"rows": 10}},
    "precision": {"bench": lambda suite: bench(suite, precision="bfloat16")},
    "batch size": {"bench": lambda suite: bench(suite, batch_size=4)},
    "dtype": {"dtype": "bfloat16"},
    "a shared expert": {"reads": READS | {"source": "shared"}},
    "factors": {"factored": True},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_kept_states_are_of_the_same_pass(family, passes, other):
    size = {"size": make_task("size")}
    trained(family, size)
    kept = "factored" not in other and other.get("reads", READS)["source"] == "base"
    for times in (2, 2 if kept else 3):
        trained(family, size, **other)
        assert len(passes) == times


def test_kept_states_are_of_the_same_weights_texts_and_configuration(family, passes, tmp_path):
    size = {"size": make_task("size")}
    trained(family, size)
    trained(family, size, base={name: tensor + 1 for name, tensor in opened(family).base.items()})
    assert len(passes) == 2
    trained(family, {"size": make_task("size", rows={"train": 20, "validation": 4, "test": None})})
    assert len(passes) == 3
    config = json.loads((family / "base" / "config.json").read_text()) | {"layer_norm_eps": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    trained(family, size, base_folder=tmp_path)
    assert len(passes) == 4


def test_rows_that_may_be_scored_are_read_anew(family, passes):
    for _ in range(2):
        fresh = bench(opened(family, tasks={"size": make_task("size")}))
        for split in ("validation", "test"):
            assert learned._features(fresh, setting(**READS), "size", split)[1] > 0
    assert len(passes) == 4


def test_the_time_of_a_router_that_was_not_measured_is_in_no_record(family):
    seconds = []
    for _ in range(2):
        rows, _ = benchmark.run(bench(opened(family)), replace(setting(**READS), route=None), PROTOCOLS["strict"])
        seconds.append({row["router_seconds"] for row in rows})
    (measured,), unknown = seconds
    assert measured > 0 and unknown == {None}
