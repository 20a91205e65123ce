"""Checkpoints that do not fit are refused by name before anything is merged."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from support.family import CLASSES, METRICS, WORDS, edit_weights, frame, make_task, opened, tokenizer
from twinbench.weights.expert import in_pooler
from twinbench.weights.state_dict import read_checkpoint
from twinbench.workloads.classification.class_order import class_order


@pytest.fixture
def copy(family, tmp_path):
    shutil.copytree(family, tmp_path / "family")
    return tmp_path / "family"


POOLER = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def name_classes(folder, names) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"id2label": {str(i): name for i, name in enumerate(names)}}
    path.write_text(json.dumps(config))


def test_a_head_with_its_classes_in_another_order_is_put_in_the_tasks(copy, capsys):
    """The same model under other class ids gives the task's classes the same logits."""
    folder, order = copy / "experts" / "colours", [2, 0, 1]  # blue, red, green
    wanted = opened(copy).heads["colours"]
    assert capsys.readouterr().out == ""
    outputs = ("classifier.weight", "classifier.bias")
    edit_weights(folder, lambda state: state | {name: state[name][order].contiguous() for name in outputs})
    name_classes(folder, ["Blue", "r e-d", "GREEN"])
    found = opened(copy).heads["colours"]
    assert found.keys() == wanted.keys() == {*outputs, *POOLER}
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    out = capsys.readouterr().out
    assert out == (
        "expert colours: its config.json has the classes in another order; its head is put in the task's: "
        "red, green, blue\n"
    )
    name_classes(folder, ["LABEL_0", "LABEL_1", "LABEL_2"])  # nobody named them: as they stand
    found = opened(copy).heads["colours"]
    assert torch.equal(found["classifier.bias"], wanted["classifier.bias"][order])
    name_classes(folder, ["red", "green", "blue"])
    assert torch.equal(opened(copy).heads["colours"]["classifier.bias"], wanted["classifier.bias"][order])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "names", [["red", "green", "yellow"], ["red", "green"], ["red", "red", "blue"], ["LABEL_0", "LABEL_1", "blue"]]
)
def test_a_head_of_other_classes_is_refused_with_both_lists(copy, names):
    name_classes(copy / "experts" / "colours", names)
    with pytest.raises(
        ValueError, match=f"expert colours: .* names the classes {', '.join(names)}, .*red, green, blue;"
    ):
        opened(copy)


def test_names_that_differ_in_their_case_alone_are_told_apart(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert class_order(tmp_path, ["c", "C"], "x") is None
    name_classes(tmp_path, ["C", "c"])
    assert class_order(tmp_path, ["c", "C"], "x") == [1, 0]
    name_classes(tmp_path, [f"c{i}" for i in range(12)])  # the keys of JSON are text: "10" is before "2"
    assert class_order(tmp_path, [f"c{i}" for i in range(12)], "x") is None
    assert class_order(tmp_path / "nowhere", ["a", "b"], "x") is None


def test_experts_come_under_the_names_of_the_base(family):
    suite = opened(family)
    assert list(suite.experts) == list(CLASSES)
    for task in CLASSES:
        assert suite.experts[task].keys() == suite.base.keys()
        stored = load_file(family / "experts" / task / "model.safetensors")
        for name in suite.base:
            assert torch.equal(suite.experts[task][name], stored[f"bert.{name}"])
        assert set(suite.heads[task]) == {"classifier.weight", "classifier.bias", *POOLER}
        assert torch.equal(suite.heads[task]["bert.pooler.dense.bias"], stored["bert.pooler.dense.bias"])


def test_the_old_cut_merges_the_pooler(family):
    suite = opened(family, head="classifier")
    assert set(suite.heads["size"]) == {"classifier.weight", "classifier.bias"}
    assert {name.removeprefix("bert.") for name in POOLER} < suite.base.keys() == suite.experts["size"].keys()


def test_a_base_needs_a_pooler_only_where_that_is_merged(copy):
    edit_weights(copy / "base", lambda s: {name: tensor for name, tensor in s.items() if "pooler" not in name})
    assert opened(copy).heads["letters"].keys() >= POOLER
    with pytest.raises(ValueError, match=r"base .* lacks pooler\.dense\.weight"):
        opened(copy, head="classifier")


@pytest.mark.parametrize("head", ["pooler", "classifier"])
def test_a_pooler_that_no_classifier_of_the_architecture_uses_is_nobodys(copy, head):
    """RoBERTa's base has one, and its classifiers have that layer in their head."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.RobertaConfig(vocab_size=44, max_position_embeddings=40, pad_token_id=0, **sizes)
    transformers.RobertaModel(config).save_pretrained(copy / "base")
    for task, classes in CLASSES.items():
        config.num_labels = len(classes or "1")
        transformers.RobertaForSequenceClassification(config).save_pretrained(copy / "experts" / task)
    suite = opened(copy, head)
    assert not any(map(in_pooler, suite.base)) and suite.base.keys() == suite.experts["size"].keys()
    assert len(suite.heads["size"]) == 4


@pytest.mark.parametrize("kind", ["Bert", "Albert", "BigBird", "Electra", "Roberta", "MPNet", "DistilBert"])
def test_only_a_pooler_stands_above_the_hidden_states(kind):
    """The rule that finds the head by name, against the gradients of a real model of each architecture."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(vocab_size=40, max_position_embeddings=40, **sizes)
    model = getattr(transformers, f"{kind}Model")(config)
    model(torch.arange(5, 25).view(2, 10)).last_hidden_state.sum().backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unused == {name for name, _ in model.named_parameters() if in_pooler(name)}


def adapt(root, task, **settings) -> torch.nn.Module:
    """Replace a task's expert by a LoRA adapter with another rank than the next task's; give the model it makes."""
    import peft
    from transformers import AutoModelForSequenceClassification, set_seed

    position, classes = list(CLASSES).index(task), CLASSES[task]
    set_seed(position)
    labels = len(classes) if classes else 1
    model = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=labels)
    targets = [["query", "value"], ["key", "dense", "word_embeddings"], ["query"]][position]
    given = {"r": 2 + position, "lora_alpha": 8, "target_modules": targets, "exclude_modules": ["pooler.dense"]}
    model = peft.get_peft_model(model, peft.LoraConfig("SEQ_CLS", **given | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    folder = root / "experts" / task
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    return model.merge_and_unload().eval()


def test_adapters_of_different_rank_and_targets_are_experts_beside_whole_checkpoints(copy):
    merged = {task: adapt(copy, task) for task in ("letters", "colours")}
    suite = opened(copy)
    for task, model in merged.items():
        wanted = model.bert.state_dict()
        assert suite.experts[task].keys() == suite.base.keys()
        for name in suite.base:
            torch.testing.assert_close(suite.experts[task][name], wanted[name], rtol=0, atol=1e-6)
        assert any(not torch.equal(suite.base[name], wanted[name]) for name in suite.base)
        for name in ("classifier.weight", "classifier.bias", *POOLER):  # the pooler is not adapted: the base's
            assert torch.equal(suite.heads[task][name], model.state_dict()[name])


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": "all"},
        {"bias": "all", "modules_to_save": ["pooler", "LayerNorm", "classifier"]},
        {"bias": "all", "exclude_modules": None, "target_modules": ["dense"]},
        {"bias": "lora_only"},
    ],
)
def test_biases_and_modules_that_an_adapter_saves_are_its_experts_own(copy, settings):
    wanted, suite = adapt(copy, "letters", **settings).state_dict(), opened(copy)
    for name, tensor in suite.experts["letters"].items():
        torch.testing.assert_close(tensor, wanted[f"bert.{name}"], rtol=0, atol=1e-6)
    assert set(suite.heads["letters"]) == {"classifier.weight", "classifier.bias", *POOLER}
    for name, tensor in suite.heads["letters"].items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)
    assert not torch.equal(wanted["bert.encoder.layer.0.attention.self.query.bias"], torch.zeros(16))


def test_an_adapter_of_another_base_is_refused(copy):
    adapt(copy, "letters")
    path = copy / "experts" / "letters" / "adapter_model.safetensors"
    save_file({name.replace("layer.1", "layer.7"): t for name, t in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"does not fit the base, which lacks bert\.encoder\.layer\.7"):
        opened(copy)


def test_an_adapter_without_a_head_is_refused(copy):
    adapt(copy, "letters")
    path = copy / "experts" / "letters" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "classifier" not in name}, path)
    with pytest.raises(ValueError, match="expert letters: task letters needs the head"):
        opened(copy)


def rename(state, old, new):
    return {new if name == old else name: tensor for name, tensor in state.items()}


NORM = "bert.embeddings.LayerNorm.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: rename(s, NORM, "bert.embeddings.Norm.weight"), "lacks embeddings.LayerNorm.weight"),
        (lambda s: s | {"bert.extra": torch.ones(1)}, "has unknown extra"),
        (lambda s: s | {NORM: torch.ones(17)}, r"LayerNorm.weight is F32 \[17\], not F32 \[16\]"),
        (lambda s: s | {NORM: s[NORM].half()}, "LayerNorm.weight is F16"),
        (
            lambda s: s | {NORM: torch.full((16,), float("nan"))},
            "NaN or infinite weights in embeddings.LayerNorm.weight",
        ),
        (lambda s: s | {"classifier.weight": torch.ones(4, 16)}, "task colours needs the head"),
    ],
)
def test_an_expert_that_does_not_fit_is_refused(copy, edit, words):
    edit_weights(copy / "experts" / "colours", edit)
    with pytest.raises(ValueError, match=words) as error:
        opened(copy)
    assert "expert colours" in str(error.value)


def test_only_the_first_three_differences_are_listed(copy):
    edit_weights(copy / "experts" / "size", lambda s: s | {f"bert.extra{i}": torch.ones(1) for i in range(5)})
    with pytest.raises(ValueError, match=r"extra0, extra1, extra2 \(\+2 more\)"):
        opened(copy)


def test_another_vocabulary_is_refused(copy):
    tokenizer([*WORDS[1:], WORDS[0]]).save_pretrained(copy / "experts" / "letters")
    with pytest.raises(ValueError, match="expert letters: its tokenizer differs from the base's in 40 tokens"):
        opened(copy)


def test_pickles_and_truncated_files_are_refused(copy):
    folder = copy / "experts" / "letters"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated, or not a safetensors file"):
        opened(copy)
    torch.save({}, folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="only pickled weights"):
        opened(copy)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        opened(copy)


def test_sharded_checkpoints(tmp_path):
    import json

    state = {f"layer{i}": torch.full((3,), float(i)) for i in range(4)}
    save_file({k: state[k] for k in ("layer0", "layer1")}, tmp_path / "a.safetensors")
    save_file({k: state[k] for k in ("layer2", "layer3")}, tmp_path / "b.safetensors")
    owner = {k: "a.safetensors" if k in ("layer0", "layer1") else "b.safetensors" for k in state}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owner}))
    found = read_checkpoint(tmp_path)
    assert {k: t.tolist() for k, t in found.items()} == {k: t.tolist() for k, t in state.items()}
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"its index names b.safetensors"):
        read_checkpoint(tmp_path)


def test_splits_are_disjoint_and_stable():
    frames = {
        "train": frame("letters", 40, 0).assign(text=[f"t{i}" for i in range(40)]),
        "test": frame("letters", 9, 1),
    }
    first, again = make_task("letters", frames), make_task("letters", frames)
    train, validation = first.splits["train"], first.splits["validation"]
    assert not set(train["text"]) & set(validation["text"])
    assert (len(train), len(validation), len(first.splits["test"])) == (20, 5, 9)
    pd.testing.assert_frame_equal(validation, again.splits["validation"])
    more = make_task("letters", frames, rows={"train": 30, "validation": 5, "test": 4})
    pd.testing.assert_frame_equal(more.splits["train"].iloc[:20], train)


def test_further_splits_are_kept_beside_the_test_and_limited_as_it_is():
    frames = {"train": frame("letters", 40, 0), "test": frame("letters", 9, 1), "elsewhere": frame("letters", 8, 2)}
    assert len(make_task("letters", frames).splits["elsewhere"]) == 8
    limited = make_task("letters", frames, rows={"train": 20, "validation": 5, "test": 3}).splits
    assert {name: len(rows) for name, rows in limited.items()} == {
        "train": 20,
        "validation": 5,
        "test": 3,
        "elsewhere": 3,
    }


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("letters", lambda f: f.assign(label=[5] + [0] * (len(f) - 1)), r"row 0: label must be a class id in \[0, 1\]"),
        (
            "size",
            lambda f: f.assign(label=[0.0, np.nan] + [0.0] * (len(f) - 2)),
            "row 1: label must be a finite number; got None",
        ),
        ("size", lambda f: f.assign(label=["0.5"] * len(f)), "row 0: label must be a finite number; got '0.5'"),
        ("size", lambda f: f.assign(label=[0.5, -np.inf] * (len(f) // 2)), "row 1: label must be a finite number"),
        ("letters", lambda f: f.assign(label=["a", "c"] * (len(f) // 2)), "row 1: .* of a, b; got 'c'"),
        ("letters", lambda f: f.assign(label=[-1] + [0] * (len(f) - 1)), r"row 0: .*\[0, 1\] or of a, b; got -1"),
        ("letters", lambda f: f.assign(label=[0.5] + [0] * (len(f) - 1)), r"row 0: .*; got 0\.5"),
        ("letters", lambda f: f.iloc[:0], "split test: empty"),
        ("letters", lambda f: f.rename(columns={"text": "sentence"}), "no column text; it has sentence, label"),
        ("letters", lambda f: f.assign(text=[None] + ["w1"] * (len(f) - 1)), "row 0: text is missing"),
    ],
)
def test_bad_data_is_named(name, change, words):
    with pytest.raises(ValueError, match=words):
        make_task(name, {"train": frame(name, 40, 0), "test": change(frame(name, 10, 1))})


def test_labels_may_be_names_of_classes():
    frames = {"train": frame("letters", 40, 0), "test": frame("letters", 10, 1)}
    named = {
        split: part.assign(label=[CLASSES["letters"][label] for label in part["label"]])
        for split, part in frames.items()
    }
    named["test"] = named["test"].astype({"label": "category"})
    for split, part in make_task("letters", named).splits.items():
        expected = make_task("letters", frames).splits[split]
        assert part["label"].dtype == np.int64 and part["label"].tolist() == expected["label"].tolist()


def test_bad_task_settings_are_named():
    with pytest.raises(ValueError, match="metrics must be of"):
        make_task("letters", metrics=["bleu"])
    for task, metric, words in (
        ("colours", "f1", "metric f1 is for two classes, and the task has 3 classes; choose of accuracy, f1_macro"),
        ("colours", "accuracy_f1", "for two classes"),
        ("letters", "pearson", "metric pearson is for numbers, and the task has 2 classes; choose of accuracy, f1, "),
        ("letters", "pearson_spearman", "for numbers"),
        ("size", "f1", "metric f1 is for two classes, and the task is a regression; choose of pearson, spearman"),
        ("size", "matthews", "metric matthews is for classes"),
    ):
        with pytest.raises(ValueError, match=words):
            make_task(task, metrics=[*METRICS[task], metric])
    assert make_task("colours", metrics=["f1_macro", "matthews"]).metrics == ("f1_macro", "matthews")
    for classes in ([], ["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="two different names or more"):
            make_task("letters", classes=classes)
    with pytest.raises(ValueError, match=r"train: rows must be in \[1, 35\]"):
        make_task("letters", rows={"train": 99, "validation": 5, "test": None})
