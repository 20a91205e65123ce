"""Fine-tuning for real on a tiny model: it learns, repeats itself, is done once, and leaves nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from support.commands import OS_ENVIRON, ROOT
from support.family import CLASSES, METRICS
from twinbench.system import device
from twinbench.workloads.classification.data import Spec, load_task
from twinbench.workloads.classification.finetune import Recipe, finetune

RECIPE = Recipe(
    epochs=16, batch_size=8, lr=5e-3, weight_decay=0.0, warmup=0.1, freeze=("embeddings.word_embeddings",), seed=0
)


def task(name):
    """Texts whose label can be read off their first word."""
    words = [f"w{i % 12}" for i in range(120)]
    labels = [(i % 12) // 6 if name == "letters" else (i % 12) / 6 - 1.0 for i in range(120)]
    frames = {
        "train": pd.DataFrame({"text": words, "label": labels}),
        "test": pd.DataFrame({"text": words[:12], "label": labels[:12]}),
    }
    rows = {"train": 90, "validation": 30, "test": None}
    settings = {"columns": ["text"], "classes": CLASSES[name], "metrics": METRICS[name], "max_length": 8, "rows": rows}
    return load_task(name, Spec(**settings), lambda: frames, {})


@pytest.mark.parametrize("name", ["letters", "size"])
def test_an_expert_learns_and_is_a_plain_hugging_face_folder(family, tmp_path, name):
    folder = finetune(family / "base", task(name), RECIPE, tmp_path / name, "cpu", family / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    logits = model(**AutoTokenizer.from_pretrained(folder)(["w1", "w11"], return_tensors="pt")).logits
    assert logits[0].argmax() == 0 and logits[1].argmax() == 1 if name == "letters" else logits[0] < 0 < logits[1]
    history = json.loads((folder / "training.json").read_text())
    scores = [entry[f"eval_{METRICS[name][0]}"] for entry in history["curve"] if "eval_loss" in entry]
    assert len(scores) == RECIPE.epochs
    assert scores[-1] > 0.85
    stored, base = load_file(folder / "model.safetensors"), load_file(family / "base" / "model.safetensors")
    assert torch.equal(stored["bert.embeddings.word_embeddings.weight"], base["embeddings.word_embeddings.weight"])
    assert not torch.equal(stored["bert.pooler.dense.weight"], base["pooler.dense.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [name], "no temporary folder is left"


def test_deterministic_and_cached(family, tmp_path):
    first = finetune(family / "base", task("letters"), RECIPE, tmp_path / "a", "cpu", family / "base")
    again = finetune(family / "base", task("letters"), RECIPE, tmp_path / "b", "cpu", family / "base")
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert finetune(family / "base", task("letters"), RECIPE, tmp_path / "a", "cpu", family / "base") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before


def test_smoothed_labels_make_an_expert_less_sure(family, tmp_path):
    sure = {}
    for share in (0.0, 0.8):
        recipe = replace(RECIPE, epochs=30, label_smoothing=share)
        folder = finetune(family / "base", task("letters"), recipe, tmp_path / str(share), "cpu", family / "base")
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        words = AutoTokenizer.from_pretrained(folder)(task("letters").splits["train"]["text"].tolist(), padding=True)
        with torch.inference_mode():
            sure[share] = model(**{k: torch.tensor(v) for k, v in words.items()}).logits.softmax(1).amax(1).mean()
    assert sure[0.8] < sure[0.0] - 0.05


def test_a_machine_that_would_emulate_bfloat16_does_not_train_in_it(family, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_features", lambda: {"avx2", "avx512f"})
    recipe, place = replace(RECIPE, epochs=1, bf16=True), (tmp_path / "a", "cpu", family / "base")
    given = family / "base", task("letters"), recipe, *place
    with pytest.raises(ValueError, match=r"finetune.bf16=true: .* by emulation; use suite.finetune.bf16=false, which"):
        finetune(*given)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(device, "_features", lambda: {"avx512_bf16"})
    assert finetune(*given) == tmp_path / "a"
    monkeypatch.setattr(device, "_features", set)
    rest = tmp_path / "b", "cpu", family / "base"
    assert finetune(family / "base", task("letters"), replace(recipe, bf16=False), *rest) == tmp_path / "b"


def test_a_damaged_expert_is_trained_again_and_said_once(family, tmp_path, capfd):
    recipe = replace(RECIPE, epochs=1)
    folder = finetune(family / "base", task("letters"), recipe, tmp_path / "a", "cpu", family / "base")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-5] + bytes([whole[-5] ^ 64]) + whole[-4:])
    capfd.readouterr()
    for _ in range(2):
        assert finetune(family / "base", task("letters"), recipe, folder, "cpu", family / "base") == folder
    assert (folder / "model.safetensors").read_bytes() == whole
    warning = f"{folder}: model.safetensors is not what was written there; it is made again"
    assert [line for line in capfd.readouterr().err.splitlines() if "made again" in line] == [warning]


def test_a_killed_training_leaves_no_expert(family, tmp_path):
    script = (
        "import sys; sys.path.insert(0, 'tests'); sys.path.insert(0, 'tests/workloads/classification')\n"
        "from pathlib import Path; from dataclasses import replace; from test_experts import RECIPE, task\n"
        "from twinbench.workloads.classification.finetune import finetune\n"
        "base, folder = map(Path, sys.argv[1:])\n"
        "finetune(base, task('letters'), replace(RECIPE, epochs=100000), folder, 'cpu', base)\n"
    )
    arguments = [sys.executable, "-c", script, str(family / "base"), str(tmp_path / "a")]
    process = subprocess.Popen(arguments, cwd=ROOT, env=OS_ENVIRON, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".a-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None and list(tmp_path.glob(".a-*")), "it was not training yet"
    time.sleep(1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "a").exists()
    folder = finetune(family / "base", task("letters"), RECIPE, tmp_path / "a", "cpu", family / "base")
    assert (folder / "training.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "what the killed process left is removed"


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("lr", 0), ("batch_size", 0), ("warmup", 1.0), ("weight_decay", -1), ("label_smoothing", 1)],
)
def test_recipe_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"suite.finetune.{name}"):
        Recipe(**{**vars(RECIPE), name: value})
