"""A tiny real transformer family: a BERT of two layers and its tokenizer, three tasks, their rows and their suite."""

from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from twinbench.suite import Suite, Task
from twinbench.workbench import Workbench
from twinbench.workloads.classification import workload
from twinbench.workloads.classification.data import Spec, load_task
from twinbench.workloads.classification.open import open_suite, open_tokenizer

WORDS = [f"w{i}" for i in range(40)]
CLASSES = {"letters": ["a", "b"], "colours": ["red", "green", "blue"], "size": None}
METRICS = {"letters": ["accuracy", "f1"], "colours": ["accuracy"], "size": ["pearson_spearman", "pearson", "spearman"]}


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
        "defaults": [{"/workload@_here_": "classification"}],
        "name": "tiny",
        "base": {"path": str(root / "base")},
        "tasks": tasks,
        "checkpoints": {task: {"path": str(root / "experts" / task)} for task in CLASSES},
    }
    (conf / "suite").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(suite | changes), conf / "suite" / "tiny.yaml")


def edit_weights(folder: Path, edit) -> None:
    """Rewrite a folder's safetensors with `edit(state) -> state`."""
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def make_task(name: str, frames: dict[str, pd.DataFrame] | None = None, limit: int | None = None, **changes) -> Task:
    """A task of the family, of the given frames; `changes` replace what its file says."""
    said = {"columns": ["text"], "classes": CLASSES[name], "metrics": METRICS[name], "max_length": 16}
    said |= {"rows": {"train": 20, "validation": 5, "test": None}} | changes
    frames = frames or {"train": frame(name, 40, 0), "test": frame(name, 10, 1)}
    return load_task(name, Spec(**said), lambda: frames, {}, limit)


def opened(root: Path, head: str = "pooler", tasks: dict[str, Task] | None = None) -> Suite:
    """The family, or some tasks of it, as a suite that merges all experts."""
    tasks = tasks or {task: make_task(task) for task in CLASSES}
    experts = {task: root / "experts" / task for task in tasks}
    settings = {"name": "tiny", "merged": list(tasks), "head": head}
    return open_suite(root / "base", experts, tasks, open_tokenizer(root / "base"), settings, workload)


def bench(suite: Suite, batch_size: int = 8, precision: str = "float32") -> Workbench:
    """A workbench of the CPU that forgets nothing."""
    return Workbench(suite, "cpu", batch_size, 10**9, precision)
