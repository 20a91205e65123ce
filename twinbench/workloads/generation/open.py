"""Opening a suite of causal language models: all weights are merged, and there are no heads."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from twinbench.suite import Suite, Task, Workload
from twinbench.system.mistakes import Mistake
from twinbench.weights.expert import check_vocabulary, is_adapter, open_expert
from twinbench.weights.lora import read_factors
from twinbench.weights.pretrained import open_pretrained
from twinbench.weights.state_dict import check_finite, check_same_layout, layout, read_checkpoint
from twinbench.workloads.generation.attention import attend_per_prompt


def open_suite(
    base_folder: Path,
    experts: Mapping[str, Path],
    tasks: Mapping[str, Task],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping,
    kind: Workload,
) -> Suite:
    """Open a causal language model and its experts, whole checkpoints or LoRA adapters, and check that they fit.

    Args:
        settings: the suite's ``name``, ``merged`` (the tasks whose experts are merged), ``factored``, ``dtype`` and
            ``device_map``.
        kind: this kind of model, which the suite hands on.

    Raises:
        ValueError: names, shapes, dtypes or vocabularies differ, or weights are not finite.
    """
    words, factored = Path(tokenizer.name_or_path), settings["factored"]
    last, known = max(tokenizer.get_vocab().values()), open_pretrained(AutoConfig, base_folder).vocab_size
    if last >= known:
        raise Mistake(f"the tokenizer ({words}) has tokens up to {last}, the base embeddings for {known}")
    base, reference = read_checkpoint(base_folder), layout(base_folder)
    check_finite(base, "base")
    weights = {}
    experts = {task: folder for task, folder in experts.items() if task in settings["merged"]}
    for task, folder in experts.items():
        if factored:
            weights[task] = read_factors(folder, base)
            continue
        state, entries = open_expert(folder, base, reference)
        check_same_layout(reference, entries, f"expert {task}")
        check_finite(state, f"expert {task}")
        check_vocabulary(words, folder, f"expert {task}")
        weights[task] = state
    stored = [folder / "adapter_model.safetensors" for folder in experts.values() if is_adapter(folder)]
    taken = sum(file.stat().st_size for file in stored) if len(stored) == len(experts) else None
    placed = {"dtype": settings["dtype"], "device_map": settings["device_map"], "adapter_bytes": taken}
    return Suite(settings["name"], base_folder, base, weights, {}, tasks, tokenizer, kind, factored=factored, **placed)


def module(suite: Suite, device: str) -> nn.Module:
    """The whole model that merged state dicts are put into; it holds the base until then."""
    placed = {"device_map": suite.device_map} if suite.device_map else {}
    given = {"dtype": getattr(torch, suite.dtype)} | placed
    model = open_pretrained(AutoModelForCausalLM, suite.base_folder, **given).eval()
    model = model if placed else model.to(device)
    if model.device.type == "cpu":  # where it was measured
        attend_per_prompt(model)
    return model


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A causal language model's tokenizer; of a prompt that is too long it leaves out the beginning.

    Raises:
        ValueError: there is none, or none without remote code.
    """
    needed = f"{folder}: no tokenizer that can be read without remote code; set suite.tokenizer to the source of one"
    try:
        tokenizer = open_pretrained(AutoTokenizer, folder, truncation_side="left")
    except ValueError as error:
        raise Mistake(f"{needed} ({error})") from error
    if not tokenizer("word", add_special_tokens=False)["input_ids"]:  # a class known by the model, and no vocabulary
        raise Mistake(needed)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer
