"""What the router reads: hidden states of any layer, pooled over a row's tokens, against a row-by-row reference."""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from support.family import CLASSES, WORDS, make_task
from twinbench.merging.merged import Merged
from twinbench.merging.method import Method
from twinbench.routing import learned
from twinbench.routing.features import characters, features
from twinbench.routing.learned import Setting
from twinbench.routing.router import Mlp, Router, grouped
from twinbench.suite import backbone, load, open_suite

RECIPE = {"hidden_ratio": 2.0, "dropout": 0.5, "lr": 5e-3, "epochs": 3, "batch_size": 16, "top_k": None}
DRAW = np.random.default_rng(0)
STATIC = Method("base", lambda base, experts: Merged(base), None, None)


def pairs(rows: int):
    texts = {name: [" ".join(DRAW.choice(WORDS, DRAW.integers(1, 7))) for _ in range(rows)] for name in ("one", "two")}
    return pd.DataFrame(texts | {"label": [0, 1] * (rows // 2)})


@pytest.fixture
def suite(family):
    """Two tasks of one text, and one of two."""
    frames = {"train": pairs(40), "test": pairs(10)}
    tasks = {task: make_task(task) for task in CLASSES}
    tasks["letters"] = make_task("letters", frames, columns=["one", "two"])
    return open_suite(
        "tiny", family / "base", {task: family / "experts" / task for task in CLASSES}, tasks, head="pooler"
    )


@torch.inference_mode()
def reference(suite, task, layer, pool, row):
    """One row, alone and unpadded, through the whole model."""
    texts = [suite.tasks[task].splits["test"][column][row] for column in suite.tasks[task].columns]
    batch = suite.tokenizer(*texts, truncation=True, max_length=16, return_tensors="pt")
    states = backbone(suite, "cpu")(**batch, output_hidden_states=True).hidden_states
    hidden = states[-1 if layer is None else layer][0]
    if pool == "segments":
        ids = batch.sequence_ids(0)
        halves = [hidden[[at for at, column in enumerate(ids) if column == which]] for which in (0, 1)]
        return torch.cat([half.mean(0) if len(half) else torch.zeros(hidden.shape[1]) for half in halves])
    return {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pool]


@pytest.mark.parametrize("pool", ["mean", "first", "last", "segments"])
@pytest.mark.parametrize("layer", [None, 0, 1, 2])
def test_features_are_the_layers_hidden_states_pooled(suite, layer, pool):
    module = backbone(suite, "cpu")
    load(module, dict(suite.base.items()))
    for task in ("letters", "colours"):
        found = features(module, suite, task, "test", layer=layer, pool=pool, rows=None, batch_size=4)
        wanted = torch.stack([reference(suite, task, layer, pool, row) for row in range(10)])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        some = features(module, suite, task, "test", layer=layer, pool=pool, rows=3, batch_size=4)
        torch.testing.assert_close(some, wanted[:3], atol=1e-5, rtol=0)


def test_layers_that_are_not_read_are_not_run(suite):
    module, ran = backbone(suite, "cpu"), []
    hooks = [
        layer.register_forward_hook(lambda *_, at=at: ran.append(at)) for at, layer in enumerate(module.encoder.layer)
    ]
    features(module, suite, "size", "test", layer=1, pool="mean", rows=4, batch_size=4)
    assert ran == [0]
    features(module, suite, "size", "test", layer=None, pool="mean", rows=4, batch_size=4)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 0, 1], "the module is whole again"


def test_a_layer_that_is_not_there_is_refused(suite):
    with pytest.raises(ValueError, match=r"router\.layer must be in \[0, 2\] or null, got 3"):
        features(backbone(suite, "cpu"), suite, "size", "test", layer=3, pool="mean", rows=None, batch_size=4)


def test_a_router_is_trained_on_held_out_rows_or_on_so_many_training_rows(suite):
    static = Method("average", lambda base, experts: Merged(base), None, None)
    for rows, sizes in ((None, (4, 1)), (7, (7, 5)), (500, (20, 5))):
        setting = Setting(False, Mlp(**RECIPE, rows=rows), 0, "cpu", 8)
        train, held_out, _ = learned._examples(suite, static, setting, "size")
        assert (len(train), len(held_out)) == sizes
        where = {"layer": None, "pool": "mean", "batch_size": 8}
        load(backbone(suite, "cpu"), dict(suite.base.items()))
        read = features(
            backbone(suite, "cpu"), suite, "size", "validation" if rows is None else "train", rows=sizes[0], **where
        )
        assert torch.equal(train, read)


def test_the_base_is_read_where_the_router_says_so(suite):
    """The same routes whatever the shared expert is, and other ones where it is read."""
    routes, before = {}, learned._weighed.cache_info().hits
    for source in ("base", "shared"):
        for task in ("letters", "size"):
            expert = suite.experts[task]
            made = Method(task, lambda base, experts, own=expert: Merged(own), None, None)
            setting = Setting(False, Mlp(**RECIPE, source=source), 0, "cpu", 8)
            routes[source, task] = learned.weights(suite, made, setting, "colours", "test")[0]
    assert torch.equal(routes["base", "letters"], routes["base", "size"])
    assert learned._weighed.cache_info().hits > before, "and found once for all of them"
    assert not torch.equal(routes["shared", "letters"], routes["shared", "size"])
    asked = [learned.weights(suite, made, replace(setting, gold_biases=gold), "colours", "test")[0] for gold in (0, 1)]
    assert asked[0] is not asked[1]
    base = replace(setting, router=Mlp(**RECIPE, source="base"))
    asked = [learned.weights(suite, made, replace(base, gold_biases=gold), "colours", "test")[0] for gold in (0, 1)]
    assert asked[0] is asked[1], "the base has the same biases under every protocol"


def test_a_router_is_trained_once_for_all_ways_to_use_it(suite):
    setting = Setting(False, None, 0, "cpu", 8)
    routers = [
        learned.learned(suite, STATIC, replace(setting, router=Mlp(**RECIPE, **use)))[0]
        for use in ({}, {"groups": 2}, {"tolerance": 0.1})
    ]
    assert routers[0] is routers[1] is routers[2]


def test_seconds_are_those_of_what_was_read_and_trained(suite, monkeypatch):
    """By a clock that goes on by one each time that it is looked at: hidden states and characters take one each."""
    monkeypatch.setattr(learned, "time", SimpleNamespace(perf_counter=count().__next__))
    for rows, split in ((None, 1), (7, 2)):
        setting = Setting(False, Mlp(**RECIPE, characters=8, rows=rows), 0, "cpu", 8)
        assert learned.learned(suite, STATIC, setting)[1] == len(CLASSES) * 2 * split + 1
        assert learned.weights(suite, STATIC, setting, "size", "test")[1] == 3


def test_weights_are_of_the_known_task_or_of_the_routers_choice(suite):
    asked = (suite, STATIC, Setting(False, Mlp(**RECIPE), 0, "cpu", 8), "colours", "test")
    soft, _ = learned.weights(*asked)
    assert torch.equal(learned.applied(suite, STATIC, "router", *asked[2:]), soft)
    assert learned.applied(suite, STATIC, None, *asked[2:]) is None
    hard = learned.applied(suite, STATIC, "top1", *asked[2:])
    assert torch.equal(hard, torch.nn.functional.one_hot(soft.argmax(1), 3).float())
    assert learned.applied(suite, STATIC, "task", *asked[2:]).tolist() == [[0, 1, 0]] * 10


def test_groups_are_of_the_routers_logits(suite):
    setting = Setting(False, Mlp(**RECIPE), 0, "cpu", 8)
    plain, _ = learned.weights(suite, STATIC, setting, "size", "test")
    router, _ = learned.learned(suite, STATIC, setting)
    logits = router.logits(learned._features(suite, STATIC, setting, "size", "test")[0])
    setting = replace(setting, router=Mlp(**RECIPE, groups=2))
    assert torch.equal(learned.weights(suite, STATIC, setting, "size", "test")[0], grouped(plain, logits, 2, 0))


def test_one_held_out_row_cannot_train_a_router(family):
    rows = {task: {"train": 20, "validation": 1 if task == "size" else 2, "test": 5} for task in CLASSES}
    tasks = {task: make_task(task, rows=rows[task]) for task in CLASSES}
    experts = {task: family / "experts" / task for task in CLASSES}
    suite = open_suite("tiny", family / "base", experts, tasks, head="pooler")
    with pytest.raises(ValueError, match=r"task size has 1 held-out row.*suite\.tasks\.size\.rows\.validation"):
        learned.learned(suite, STATIC, Setting(False, Mlp(**RECIPE), 0, "cpu", 8))
    router, _ = learned.learned(suite, STATIC, Setting(False, Mlp(**RECIPE, rows=7), 0, "cpu", 8))
    assert router.logits[-1].out_features == 3


LAYER = {layer: f"encoder.layer.{layer}." for layer in (0, 1)}


@pytest.mark.parametrize("head", ["pooler", "classifier"])
def test_a_router_is_stored_with_what_it_reads_beside_the_shared_model(family, tmp_path, head):
    """The size of a file that holds both, layer by layer; the embeddings' matrices are frozen here."""
    tasks = {task: make_task(task) for task in CLASSES}
    experts = {task: family / "experts" / task for task in CLASSES}
    suite, written = open_suite("tiny", family / "base", experts, tasks, head=head), tmp_path / "router.safetensors"
    shared = {name: t if "_embeddings" in name else t + 1 for name, t in suite.base.items()}
    no_biases = {name: tensor for name, tensor in shared.items() if "bias" not in name}
    moved = [name for name in shared if "_embeddings" not in name and not name.startswith("pooler")]
    below = [name for name in moved if not name.startswith(LAYER[1])]
    biases = [name for name in moved if "bias" in name]
    assert len(moved) > len(below) > 2 and all(name.startswith((LAYER[0], "embeddings.LayerNorm")) for name in below)
    for recipe, stored, beside in (
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
        setting = Setting(False, Mlp(**RECIPE, **recipe), 0, "cpu", 8)
        router = Router(16, 3, setting.router)
        save_file(router.state_dict() | {f"base.{name}": suite.base[name] for name in beside}, written)
        assert learned.router_bytes(suite, router, stored, setting) == written.stat().st_size, (recipe, beside)
    setting, router = Setting(False, Mlp(**RECIPE, source="base"), 0, "cpu", 8), Router(16, 3, setting.router)
    save_file(router.state_dict(), written)
    slim = replace(suite, factored=True)  # whose base is stored whole
    assert learned.router_bytes(slim, router, shared, setting) == written.stat().st_size


def test_settings_of_how_weights_are_used_reach_the_trained_router(suite):
    static = Method("average", lambda base, experts: Merged(base), None, None)
    for top_k in (1, 2):
        setting = Setting(False, Mlp(**RECIPE | {"top_k": top_k}), 0, "cpu", 8)
        found, _ = learned.weights(suite, static, setting, "size", "test")
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
    suite = open_suite(
        "tiny", family / "base", {task: family / "experts" / task for task in tasks}, tasks, head="pooler"
    )
    static = Method("average", lambda base, experts: Merged(base), None, None)
    accuracy = {}
    for name, reads in {"hidden": {}, "text": {"source": None, "characters": 1024}}.items():
        setting = Setting(
            False, Mlp(**RECIPE | {"epochs": 15, "lr": 1e-3, "hidden_ratio": 0.1}, rows=300, **reads), 0, "cpu", 8
        )
        hits = [
            learned.weights(suite, static, setting, task, "test")[0].argmax(1) == position
            for position, task in enumerate(tasks)
        ]
        accuracy[name] = torch.cat(hits).float().mean()
    assert accuracy["text"] > 0.95 and accuracy["hidden"] < 0.7, accuracy


def test_characters_are_counted_per_column(suite):
    width = 64
    pairs, single = (characters(suite, task, "test", width, None) for task in ("letters", "colours"))
    assert pairs.shape == single.shape == (10, 2 * width)
    torch.testing.assert_close(pairs.view(20, width).square().mean(1), torch.ones(20))
    assert not single[:, width:].any() and (single >= 0).all()
    assert torch.equal(characters(suite, "letters", "test", width, 4), pairs[:4])
    first = suite.tasks["letters"].splits["test"]["one"][0]
    grams = {first[at : at + n] for n in range(1, 5) for at in range(len(first) - n + 1)}
    assert 0 < (pairs[0, :width] > 0).sum() <= min(width, len(grams))


def test_hidden_states_and_characters_are_read_beside_each_other(suite):
    static = Method("average", lambda base, experts: Merged(base), None, None)
    setting = Setting(False, Mlp(**RECIPE, characters=32), 0, "cpu", 8)
    both, seconds = learned._features(suite, static, setting, "size", "test")
    assert both.shape == (10, 16 + 64) and seconds > 0
    assert torch.equal(both[:, 16:], characters(suite, "size", "test", 32, None))
