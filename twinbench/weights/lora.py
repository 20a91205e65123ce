"""LoRA adapters as experts: "Low-Rank Adaptation of Large Language Models", Hu et al., arXiv 2106.09685.

``expert = base + scale * B @ A`` for every adapted matrix, with scale = lora_alpha / r (lora_alpha / sqrt(r) for
rsLoRA, arXiv 2312.03732). `read_adapter` forms the difference whole, tensor by tensor, `read_factors` leaves it
factored; either way experts may differ in rank and in what they adapt.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twinbench.system.mistakes import Mistake
from twinbench.weights.parts import LowRank
from twinbench.weights.state_dict import StateDict, listed, open_safetensors

PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?")
SECOND = re.compile(r"\.(original_module|modules_to_save)\.")  # bias="all" writes a saved module's biases three times
UNSUPPORTED = (
    *("use_dora", "lora_bias", "use_qalora", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("alora_invocation_tokens", "arrow_config", "use_bdlora", "velora_config", "kasa_config", "monteclora_config"),
)  # settings that change what B and A mean
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations after which the base is another one
ONCE = (
    "convert them once, in a folder of your own that you give as path: safetensors.torch.save_file(torch.load("
    "'adapter_model.bin', map_location='cpu', weights_only=True), 'adapter_model.safetensors')"
)


@dataclass(frozen=True)
class Delta:
    """What is added to one weight: ``scale * B @ A``, transposed where the weight is stored as (in, out).

    Attributes:
        a, b: keys of A (r, in) and B (out, r) in the adapter's file.
    """

    a: str
    b: str
    scale: float
    transposed: bool


def read_adapter(folder: Path, base: Mapping[str, Tensor]) -> StateDict:
    """Open a PEFT LoRA adapter (``adapter_config.json``, ``adapter_model.safetensors``) as an expert of ``base``.

    An adapted tensor is formed when it is asked for, and is float32 whatever the base is: beside weights in bfloat16,
    whose last digit is larger than most differences, these would be rounded away before anything is merged. Others
    have the base's dtype. Tensors that the adapter saves in full (``modules_to_save``, biases) replace the base's;
    those that the base does not have, such as a head, come after the base's names.

    Args:
        base: under the names that the adapted model had.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: the adapter is no LoRA, has features beyond the above, does not fit the base, or changes a tied
            embedding without the output that is tied to it.
    """
    file, deltas, full = _open(folder, base)

    def tensor(name: str) -> Tensor:
        origin = file.get_tensor(full[name]) if name in full else base[name]
        origin = origin.to(base[name].dtype) if name in base else origin
        if name not in deltas:
            return origin
        return torch.addmm(origin.float(), *_factors(file, deltas[name]), alpha=deltas[name].scale)

    return StateDict([*base, *(name for name in full if name not in base)], tensor)


def read_factors(folder: Path, base: Mapping[str, Tensor] | None = None) -> Mapping[str, LowRank]:
    """Open a PEFT LoRA adapter as factors of what it adds: ``LowRank(scale * B, A)`` by the base's parameter name.

    A pair is read when it is asked for, in float32 whatever the file holds.

    Args:
        base: if given, the adapter must fit it as for `read_adapter`, and may save tensors in full that are the
            base's, as PEFT does of an adapted embedding. Of the other tensors only shapes are looked at, so parameters
            on the meta device will do.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: as for `read_adapter`; or the adapter saves other tensors in full, which no factors stand for.
    """
    file, deltas, full = _open(folder, base)
    changed = [name for name, key in full.items() if base is None or not _is_same(file.get_tensor(key), base.get(name))]
    if changed:
        raise Mistake(
            f"{folder}: only low-rank differences can be kept factored, and the adapter saves in full {listed(changed)}"
        )

    def part(name: str) -> LowRank:
        left, right = _factors(file, deltas[name])
        return LowRank(deltas[name].scale * left, right)

    return StateDict(deltas, part)


def _open(folder: Path, base: Mapping[str, Tensor] | None) -> tuple[safe_open, dict[str, Delta], dict[str, str]]:
    """An adapter's file and what `_contents` finds in it, checked against its configuration and against the base."""
    config, path = read_config(folder), folder / "adapter_model.safetensors"
    if not path.exists():
        if (folder / "adapter_model.bin").exists():
            raise Mistake(f"{folder}: only pickled weights (adapter_model.bin), which can run code when read; {ONCE}")
        raise FileNotFoundError(
            f"{folder}: no adapter_model.safetensors; of a hub repository with adapter_model.bin alone nothing more is "
            f"fetched, as pickles can run code when read: {ONCE}"
        )
    file = open_safetensors(path)
    deltas, full = _contents(file.keys(), config, folder)
    _check_ranks(file, deltas, config, folder)
    if base is None:
        return file, deltas, full
    copies = _tied_copies(file, deltas, full, base) if config.get("ensure_weight_tying") else set()
    deltas, full = ({name: of[name] for name in of if name not in copies} for of in (deltas, full))
    _check_fit(file, deltas, full, base, config, folder)
    if not copies:
        _check_untied(deltas, full, base, config, folder)
    return file, deltas, full


def _is_same(tensor: Tensor, origin: Tensor | None) -> bool:
    return origin is not None and torch.equal(tensor.to(origin.dtype), origin)


def _factors(file: safe_open, delta: Delta) -> tuple[Tensor, Tensor]:
    """Two matrices whose product has the weight's orientation, in float32 and not scaled."""
    b, a = file.get_tensor(delta.b).float(), file.get_tensor(delta.a).float()
    return (a.T, b.T) if delta.transposed else (b, a)


def read_config(folder: Path) -> dict:
    """An adapter's configuration.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not that of a plain LoRA adapter.
    """
    path = folder / "adapter_config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder}: no adapter_config.json")
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        kind = config.get("peft_type", "LORA")
        if kind == "LORA":  # what others call r, if they have it, is something else
            config["r"], config["lora_alpha"] = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, TypeError, KeyError) as error:
        raise Mistake(f"{path}: not the configuration of a LoRA adapter ({error!r})") from error
    if kind != "LORA":
        raise Mistake(f"{path}: peft_type is {kind}; of PEFT's adapters only LORA can be an expert")
    found = [f"{name}={config[name]!r}" for name in UNSUPPORTED if config.get(name)]
    if str(config.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
        found.append(f"init_lora_weights={config['init_lora_weights']!r}, which changes the base")
    if found:
        raise Mistake(f"{path}: not supported: {', '.join(found)}; plain LoRA is")
    return config


def _contents(keys: list[str], config: Mapping, folder: Path) -> tuple[dict[str, Delta], dict[str, str]]:
    """Per weight what is added to it; per tensor saved in full, its key. Names are the base's."""
    factors, full = {}, {}
    for key in keys:
        match = FACTOR.fullmatch(key.removeprefix(PREFIX))
        if config.get("bias") == "all" and SECOND.search(key):
            continue
        if match:
            factors.setdefault((match["module"], bool(match["embedding"])), {})[match["factor"]] = key
        else:
            full[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = key
    unknown = [key for name, key in full.items() if ".lora_" in name or not key.startswith(PREFIX)]
    halves = [module for (module, _), pair in factors.items() if len(pair) < 2]
    if unknown or halves:
        what = f"lora_A or lora_B missing for {listed(halves)}" if halves else f"not supported: {listed(unknown)}"
        raise Mistake(f"{folder}: {what}")
    deltas = {}
    for (module, embedding), pair in factors.items():
        transposed = embedding or bool(config.get("fan_in_fan_out"))
        deltas[f"{module}.weight"] = Delta(pair["A"], pair["B"], _scale(module, config), transposed)
    return deltas, full


def _rank(module: str, config: Mapping) -> int:
    return int(by_pattern(module, config.get("rank_pattern"), config["r"]))


def _scale(module: str, config: Mapping) -> float:
    rank = _rank(module, config)
    alpha = float(by_pattern(module, config.get("alpha_pattern"), config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def by_pattern(module: str, patterns: Mapping | None, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, from a dot on."""
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, default)


def _check_ranks(file: safe_open, deltas: Mapping[str, Delta], config: Mapping, folder: Path) -> None:
    """Every A and B against the adapter's own configuration."""
    wrong = []
    for name, delta in deltas.items():
        a, b = (_shape(file, key) for key in (delta.a, delta.b))
        rank = _rank(name.removesuffix(".weight"), config)
        if len(a) != 2 or len(b) != 2:
            wrong.append(f"{name} is no matrix: A {list(a)}, B {list(b)}")
        elif (a[0], b[1]) != (rank, rank):
            wrong.append(f"{name} has A {list(a)} and B {list(b)}, adapter_config.json says rank {rank}")
    if wrong:
        raise Mistake(f"{folder}: {listed(wrong, '; ')}")


def _tied_copies(
    file: safe_open, deltas: Mapping[str, Delta], full: Mapping[str, str], base: Mapping[str, Tensor]
) -> set[str]:
    """The weights that the base does not have because they are tied to others, which the adapter changes alike.

    ``ensure_weight_tying`` writes an embedding's factors a second time, exchanged and transposed, for the output.
    """

    def change(name: str) -> tuple[Tensor, ...]:
        return _factors(file, deltas[name]) if name in deltas else (file.get_tensor(full[name]),)

    changed = full | deltas
    owns = [change(name) for name in changed if name in base]

    def is_copy(name: str) -> bool:
        return any(len(own) == len(change(name)) and all(map(torch.equal, own, change(name))) for own in owns)

    return {name for name in changed if name not in base and is_copy(name)}


def _check_untied(
    deltas: Mapping[str, Delta], full: Mapping[str, str], base: Mapping[str, Tensor], config: Mapping, folder: Path
) -> None:
    """Refuse a changed embedding in a language model whose output is tied to it.

    PEFT then changes what goes in and not what comes out, which no tied model does. The base is tied where it stores no
    second matrix of that shape.
    """
    headed = any(name not in base for name in full)
    if headed or config.get("task_type") not in ("CAUSAL_LM", None):
        return
    moved = [name for name, delta in deltas.items() if ".lora_embedding_" in delta.a]
    moved += [name for name in full if name.endswith("embed_tokens.weight") and name not in deltas]
    for name in moved:
        shape = tuple(base[name].shape)
        if not any(tuple(base[other].shape) == shape for other in base if other != name):
            raise Mistake(
                f"{folder}: changes {name} and not the output that the base ties to it, so it makes no model like the "
                "base; train it with ensure_weight_tying=True, or leave the embedding alone"
            )


def _check_fit(
    file: safe_open,
    deltas: Mapping[str, Delta],
    full: Mapping[str, str],
    base: Mapping[str, Tensor],
    config: Mapping,
    folder: Path,
) -> None:
    saved = [f".{module}." for module in config.get("modules_to_save") or ()]
    absent = [name for name in deltas if name not in base]
    absent += [name for name in full if name not in base and not any(module in f".{name}" for module in saved)]
    if absent:
        raise Mistake(f"{folder} does not fit the base, which lacks {listed(absent)}")
    wrong = []
    for name, delta in deltas.items():
        a, b, wanted = _shape(file, delta.a), _shape(file, delta.b), tuple(base[name].shape)
        if (b[0], a[1]) != (wanted[::-1] if delta.transposed else wanted):
            wrong.append(f"{name} is {list(wanted)}, A {list(a)} and B {list(b)} do not fit it")
    wrong += [
        f"{name} is {list(base[name].shape)}, the adapter's {list(_shape(file, key))}"
        for name, key in full.items()
        if name in base and tuple(base[name].shape) != _shape(file, key)
    ]
    if wrong:
        raise Mistake(f"{folder} does not fit the base: {listed(wrong, '; ')}")


def _shape(file: safe_open, key: str) -> tuple[int, ...]:
    return tuple(file.get_slice(key).get_shape())
