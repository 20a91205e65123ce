"""A tiny real transformer family made on the spot: a BERT of two layers, three experts, three small tasks on disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertModel

from support.family import CLASSES, frame, tiny_config, tokenizer, write_suite


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
