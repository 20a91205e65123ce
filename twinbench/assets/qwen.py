"""The Qwen of 2023 (model_type ``qwen``, 1.8B to 72B) and LoRA adapters of it, rewritten as Qwen2.

The two compute the same under different names, and the hub has the older one as remote code, which is not run here.
Beyond ``seq_length`` tokens the older one stretches its rotations and scales its queries (``use_dynamic_ntk``,
``use_logn_attn``) and Qwen2 does neither: what is rewritten is the same model up to that length, which becomes its
``max_position_embeddings``.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from twinbench.assets.headers import shapes
from twinbench.system.cached import made
from twinbench.system.mistakes import Mistake

FORMAT = "qwen2 a"  # of what is written here; another makes what is cached anew
ADAPTED = "base_model.model."
OUTSIDE = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
IN_LAYER = {
    "ln_1": ("input_layernorm",),
    "ln_2": ("post_attention_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),  # the one that silu is of
    "mlp.c_proj": ("mlp.down_proj",),
}
LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")
OWN = re.compile(rf"{re.escape(ADAPTED)}transformer\.h\.\d+\.mlp\.w[12]\..+")
CONSTANT = re.compile(r".*\.(masked_bias|logn_tensor|inv_freq)")  # buffers that older checkpoints carry
SHARD_BYTES = 5 * 10**9
NATIVE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def is_model(folder: Path) -> bool:
    return _json(folder / "config.json").get("model_type") == "qwen"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter under the names of 2023, some of which GPT-2's descendants have too."""
    config = _json(folder / "adapter_config.json")
    if not config:
        return False
    names = shapes(folder / "adapter_model.safetensors")
    called = "qwen" in str(config.get("base_model_name_or_path")).lower()
    return any(OWN.fullmatch(name) or (called and name.startswith(f"{ADAPTED}transformer.")) for name in names)


def converted(folder: Path, target: Path) -> Path:
    """Return ``target``, the model of a folder rewritten as Qwen2; made at the first call, a few tensors at a time.

    Dtypes stay. The tokenizer of 2023 needs remote code too and is left out; a native one beside it comes along.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: settings that Qwen2 has no equal of, or tensors that do not fit them.
    """
    return made(target, lambda part: _convert(folder, part))


def _convert(folder: Path, target: Path) -> None:
    from twinbench.weights.state_dict import StateDict, layout, listed, read_checkpoint
    from twinbench.weights.write import DTYPES, write_weights

    config, state, found = _config(folder), read_checkpoint(folder), layout(folder)
    places = {}  # by new name: old name, which of its pieces, and of how many
    unknown = []
    for name in found:
        module, _, kind = name.rpartition(".")
        if CONSTANT.fullmatch(name):
            continue
        new = _modules(module)
        if not new or kind not in ("weight", "bias"):
            unknown.append(name)
        places |= {f"{part}.{kind}": (name, at, len(new)) for at, part in enumerate(new)}
    if unknown:
        raise Mistake(f"{folder}: the language model of the Qwen of 2023 has no {listed(unknown)}")
    entries = {}
    for new, (old, _, count) in places.items():
        dtype, (rows, *rest) = found[old]
        if rows % count:
            raise Mistake(f"{folder}: {old} has {rows} rows, which are not queries, keys and values of equal width")
        entries[new] = (dtype, (rows // count, *rest))
    _check(config, entries, folder)
    config.dtype = DTYPES[entries["model.embed_tokens.weight"][0]]

    def tensor(new: str):
        old, at, count = places[new]
        return state[old].chunk(count)[at]

    print(f"rewriting {folder.name} as Qwen2, once", flush=True)
    write_weights(target, StateDict(entries, tensor), entries, shard_bytes=SHARD_BYTES, metadata={})
    config.save_pretrained(target)
    if (folder / NATIVE[0]).exists():
        for file in filter(Path.exists, (folder / name for name in NATIVE)):
            shutil.copyfile(file, target / file.name)


def converted_adapter(folder: Path, target: Path) -> Path:
    """Return ``target``, the LoRA adapter of a folder rewritten for Qwen2; made at the first call.

    What is added to every weight is the same: the three adapters of queries, keys and values share the A of the fused
    one and have a third of its B each; ranks and scales stay.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: it is no plain LoRA adapter, or adapts what a Qwen of 2023 does not have.
    """
    return made(target, lambda part: _convert_adapter(folder, part))


def _convert_adapter(folder: Path, target: Path) -> None:
    from safetensors.torch import save

    from twinbench.weights.lora import FACTOR, by_pattern, read_config
    from twinbench.weights.state_dict import listed, open_safetensors

    config, file = read_config(folder), open_safetensors(folder / "adapter_model.safetensors")
    tensors, modules, unknown = {}, {}, []
    for key in sorted(file.keys()):
        name = key.removeprefix(ADAPTED)
        factor = FACTOR.fullmatch(name)
        old = factor["module"] if factor else name.replace(".base_layer.", ".").rpartition(".")[0]
        new = _modules(old)
        if not new or name == key:
            unknown.append(key)
            continue
        read = file.get_tensor(key)
        shared = factor is not None and factor["factor"] == "A"
        if not shared and len(read) % len(new):
            raise Mistake(f"{folder}: {key} has {len(read)} rows, which cannot be cut in {len(new)}")
        pieces = [read] * len(new) if shared else read.chunk(len(new))
        for part, piece in zip(new, pieces, strict=True):
            tensors[ADAPTED + part + name[len(old) :]] = piece.clone()
        if factor:
            modules |= dict.fromkeys(new, old)
    if unknown:
        raise Mistake(f"{folder}: adapts what the Qwen of 2023 does not have: {listed(unknown)}")
    print(f"rewriting adapter {folder.name} for Qwen2, once", flush=True)
    (target / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    written = json.dumps(_adapter_config(config, modules, by_pattern), indent=2)
    (target / "adapter_config.json").write_text(written + "\n", encoding="utf-8")


def _modules(old: str) -> tuple[str, ...]:
    """The names in Qwen2 of a module of 2023; none if it has no such module."""
    layer = LAYER.fullmatch(old)
    if layer:
        return tuple(f"model.layers.{layer[1]}.{new}" for new in IN_LAYER.get(layer[2], ()))
    return (OUTSIDE[old],) if old in OUTSIDE else ()


def _config(folder: Path):
    """The settings of a Qwen of 2023 as those of Qwen2."""
    from transformers import Qwen2Config

    old, path = _json(folder / "config.json"), folder / "config.json"
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    absent = [key for key in (*needed, "seq_length") if not isinstance(old.get(key), int)]
    if absent:
        raise Mistake(f"{path}: a Qwen of 2023 needs whole numbers for {', '.join(absent)}")
    width = old.get("kv_channels", 128) * old["num_attention_heads"]
    for wrong, what in (
        (not old.get("no_bias", True), "no_bias=false (biases beside those of queries, keys and values)"),
        (old.get("rotary_pct", 1.0) != 1.0, f"rotary_pct={old.get('rotary_pct')}"),
        (width != old["hidden_size"], f"heads of together {width} channels and hidden_size={old['hidden_size']}"),
        ("quantization_config" in old, "quantized weights"),
    ):
        if wrong:
            raise Mistake(f"{path}: {what}: there is no equal of it in Qwen2")
    end = _json(folder / "generation_config.json").get("eos_token_id")
    return Qwen2Config(
        **{key: old[key] for key in needed} | {"intermediate_size": old["intermediate_size"] // 2},
        num_key_value_heads=old["num_attention_heads"],
        max_position_embeddings=old["seq_length"],
        rms_norm_eps=old.get("layer_norm_epsilon", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": float(old.get("rotary_emb_base", 10000))},
        initializer_range=old.get("initializer_range", 0.02),
        tie_word_embeddings=old.get("tie_word_embeddings", False),
        eos_token_id=end,
        architectures=["Qwen2ForCausalLM"],
    )


def _check(config, entries: Mapping[str, tuple[str, tuple[int, ...]]], folder: Path) -> None:
    """Compare names and shapes with those that the settings call for."""
    import torch
    from transformers import Qwen2ForCausalLM

    from twinbench.weights.state_dict import check_same_layout

    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in Qwen2ForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings and "lm_head.weight" not in entries:
        del wanted["lm_head.weight"]
    wanted = {name: (entries.get(name, ("",))[0], shape) for name, shape in wanted.items()}
    check_same_layout(wanted, entries, f"{folder}, in Qwen2's names,", "its config.json")


def _adapter_config(config: Mapping, modules: Mapping[str, str], by_pattern) -> dict:
    """An adapter's settings; ``modules`` maps the adapted ones' new names to the old, which its patterns are for.

    Both c_proj have a name of their own in Qwen2, so what an adapter adapts is told by what it holds.
    """
    patterns = {}
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        values = {new: by_pattern(old, config.get(pattern), config[default]) for new, old in modules.items()}
        patterns[pattern] = {new: value for new, value in values.items() if value != config[default]}
    saved = {old.rpartition(".")[2]: new.rpartition(".")[2] for old, new in OUTSIDE.items()}
    saved |= {old: new for old, (new, *_) in IN_LAYER.items() if old.startswith("ln_")}
    full = config.get("modules_to_save")
    where = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules", "auto_mapping"))
    return {
        **config,
        **patterns,
        **where,
        "target_modules": sorted({new.rpartition(".")[2] for new in modules}),
        "modules_to_save": full and [saved.get(name.rpartition(".")[2], name) for name in full],
    }


def _json(file: Path) -> dict:
    """What a JSON file holds; nothing where it is not there, or is no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
