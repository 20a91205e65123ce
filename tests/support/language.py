"""Text for tiny causal models: a tokenizer of bytes, documents of few words, prompts, and what a model says of them."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TASKS = {
    "mmlu": ["acc"],
    "truthful_qa": ["acc", "mc2"],
    "bbq": ["acc", "bias_ambig", "bias_disambig"],
    "cnn_dailymail": ["rouge2", "rougeL", "empty"],
}
WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "was", "he", "for", "it", "with", "as", "his", "on", "be"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that any text can be written, and one pair of them."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: at for at, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"])}
    fast = Tokenizer(models.BPE(vocabulary, [("t", "h")], unk_token="<unk>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=TEMPLATE, **named)


def sentence(draw, least: int, most: int) -> str:
    return " ".join(draw.choice(WORDS, draw.integers(least, most))) + "?"


def documents(folder: Path) -> None:
    """Data in the official columns, of few words."""
    draw = np.random.default_rng(0)

    def write(name: str, split: str, rows: list[dict]) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(folder / name / f"{split}.parquet")

    def question(subject: str) -> dict:
        choices = [sentence(draw, 1, 3) for _ in range(4)]
        return {
            "question": sentence(draw, 2, 6),
            "subject": subject,
            "choices": choices,
            "answer": int(draw.integers(4)),
        }

    for split, rows in (("dev", 2), ("validation", 20), ("test", 10)):
        write("mmlu", split, [question(subject) for subject in ("law", "physics") for _ in range(rows)])
    options = [
        {
            "question": f"{sentence(draw, 2, 5)} {at}",
            "mc1_targets": {"choices": [f"{sentence(draw, 1, 4)} {i}" for i in range(3)], "labels": [1, 0, 0]},
            "mc2_targets": {"choices": [f"{sentence(draw, 1, 4)} {i}" for i in range(4)], "labels": [1, 1, 0, 0]},
        }
        for at in range(60)
    ]
    write("truthful_qa", "validation", options)
    info = {"ans0": ["man", "old"], "ans1": ["woman", "nonOld"], "ans2": ["unknown", "unknown"]}
    rows = [
        {
            "question_polarity": ("neg", "nonneg")[at % 2],
            "context_condition": ("ambig", "disambig")[at // 2 % 2],
            "category": "Age",
            "question_index": str(at // 4),
            "context": sentence(draw, 2, 6),
            "question": sentence(draw, 2, 4),
            "ans0": "The man",
            "ans1": "The woman",
            "ans2": "Unknown",
            "label": at % 3,
            "answer_info": info,
            "additional_metadata": {"stereotyped_groups": ["old"]},
        }
        for at in range(160)
    ]
    write("bbq", "test", rows)
    for split in ("train", "validation", "test"):
        articles = [{"article": sentence(draw, 8, 20), "highlights": sentence(draw, 3, 6)} for _ in range(20)]
        write("cnn_dailymail", split, articles)


LENGTHS = [3, 7, 5, 2]
NEW = 10


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, 61, (1, length), generator=generator) for length in LENGTHS]


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(row.shape[1] for row in rows)
    pad = [(width - row.shape[1], 0) for row in rows]
    ids = torch.cat([torch.nn.functional.pad(row, p) for row, p in zip(rows, pad, strict=True)])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), p) for row, p in zip(rows, pad, strict=True)])
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, batch: dict[str, torch.Tensor], **settings) -> torch.Tensor:
    settings = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True} | settings
    return model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]


def log_likelihoods(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of every token but the first, given those before it."""
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**batch, position_ids=positions).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
