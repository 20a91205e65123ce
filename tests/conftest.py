"""A tiny real transformer family made on the spot: a BERT of two layers, three experts, three small tasks on disk."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
WORDS = [f"w{i}" for i in range(40)]
CLASSES = {"letters": ["a", "b"], "colours": ["red", "green", "blue"], "size": None}
METRICS = {"letters": ["accuracy", "f1"], "colours": ["accuracy"], "size": ["pearson_spearman", "pearson", "spearman"]}
OS_ENVIRON = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Path:
    """A folder with `base`, `experts/TASK`, `data/TASK/SPLIT.parquet`, `conf/suite/tiny.yaml`. Do not write to it."""
    root = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    tokenizer().save_pretrained(root / "base")
    BertModel(tiny_config()).save_pretrained(root / "base")
    for position, (task, classes) in enumerate(CLASSES.items()):
        folder = root / "experts" / task
        config = tiny_config(num_labels=len(classes) if classes else 1)
        expert = BertForSequenceClassification(config)
        expert.bert.load_state_dict(load_file(root / "base" / "model.safetensors"))
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        expert.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        data = root / "data" / task
        data.mkdir(parents=True)
        for split, rows in (("train", 60), ("test", 31)):
            frame(task, rows, seed=10 * position + (split == "test")).to_parquet(data / f"{split}.parquet")
    write_suite(root, root / "conf")
    return root


def tiny_config(**changes) -> BertConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(vocab_size=len(WORDS) + 4, max_position_embeddings=32, **sizes, **changes)


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    fast.normalizer, fast.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **special
    )


def frame(task: str, rows: int, seed: int) -> pd.DataFrame:
    """Texts from the task's own third of the words, so that a router can tell the tasks apart."""
    draw = np.random.default_rng(seed)
    own = np.array_split(WORDS, len(CLASSES))[list(CLASSES).index(task)]
    texts = [" ".join(draw.choice(own, size=draw.integers(2, 12))) for _ in range(rows)]
    labels = draw.integers(0, len(CLASSES[task]), rows) if CLASSES[task] else draw.normal(size=rows)
    return pd.DataFrame({"text": texts, "label": labels})


def write_suite(root: Path, conf: Path, **changes) -> None:
    """Write `suite/tiny.yaml` into a config folder; `changes` replace top-level entries."""
    tasks = {
        task: {
            "sources": {"folder": {"path": str(root / "data" / task)}},
            "columns": ["text"],
            "classes": CLASSES[task],
            "metrics": METRICS[task],
            "max_length": 16,
            "rows": {"train": 40, "validation": 20, "test": None},
            "data": {
                "_target_": "twinbench.tasks.parquet.columns",
                "_partial_": True,
                "train": "train",
                "test": "test",
            },
        }
        for task in CLASSES
    }
    suite = {
        "name": "tiny",
        "base": {"path": str(root / "base")},
        "tasks": tasks,
        "finetune": None,
        "only": None,
        "checkpoints": {task: {"path": str(root / "experts" / task)} for task in CLASSES},
    }
    (conf / "suite").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(suite | changes), conf / "suite" / "tiny.yaml")


def edit_weights(folder: Path, edit) -> None:
    """Rewrite a folder's safetensors with `edit(state) -> state`."""
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def command(*arguments: str, launcher: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess:
    """`python run.py ...` in a process of its own, or in a launcher's, from the project's root."""
    return subprocess.run(
        [sys.executable, *launcher, "run.py", *arguments],
        cwd=ROOT,
        env=OS_ENVIRON | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
