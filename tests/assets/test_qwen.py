"""The Qwen of 2023 rewritten as Qwen2: against its architecture written out here, and through the whole benchmark."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM

from support.commands import OS_ENVIRON, ROOT, command
from support.language import TASKS, byte_tokenizer, documents
from twinbench.assets.headers import parameters
from twinbench.assets.qwen import converted, converted_adapter
from twinbench.assets.sources import fetch
from twinbench.weights.lora import read_adapter
from twinbench.weights.state_dict import layout, read_checkpoint

HIDDEN, HEADS, INNER, LAYERS, VOCABULARY = 32, 4, 24, 2, 260
SETTINGS = {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "kv_channels": HIDDEN // HEADS,
    "vocab_size": VOCABULARY,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "layer_norm_epsilon": 1e-5,
    "rotary_emb_base": 5000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
}
WIDTHS = {  # (out, in)
    "attn.c_attn": (3 * HIDDEN, HIDDEN),
    "attn.c_proj": (HIDDEN, HIDDEN),
    "mlp.w1": (INNER, HIDDEN),
    "mlp.w2": (INNER, HIDDEN),
    "mlp.c_proj": (HIDDEN, INNER),
}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * 0.2

    state = {"transformer.wte.weight": random(VOCABULARY, HIDDEN), "lm_head.weight": random(VOCABULARY, HIDDEN)}
    state["transformer.ln_f.weight"] = 1 + random(HIDDEN)
    for layer in range(LAYERS):
        before = f"transformer.h.{layer}."
        state |= {f"{before}{name}.weight": random(*shape) for name, shape in WIDTHS.items()}
        state |= {f"{before}{name}.weight": 1 + random(HIDDEN) for name in ("ln_1", "ln_2")}
        state[f"{before}attn.c_attn.bias"] = random(3 * HIDDEN)
    return state


def logits(state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The architecture of 2023, token by token and head by head."""
    count, width = len(ids), HIDDEN // HEADS

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + SETTINGS["layer_norm_epsilon"]).sqrt() * state[f"{name}.weight"]

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        pairs = width // 2  # a half's element turns with the one as far into the other half
        angles = position / SETTINGS["rotary_emb_base"] ** (torch.arange(pairs) / pairs)
        first, second = x[:pairs], x[pairs:]
        turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
        return torch.cat(turned)

    x = state["transformer.wte.weight"][ids]
    for layer in range(LAYERS):
        before = f"transformer.h.{layer}."
        fused = linear(norm(x, before + "ln_1"), *(state[f"{before}attn.c_attn.{kind}"] for kind in ("weight", "bias")))
        queries, keys, values = fused.split(HIDDEN, dim=-1)
        read = torch.zeros(count, HIDDEN)
        for head in range(HEADS):
            own = slice(head * width, (head + 1) * width)
            turned = torch.stack([rotated(keys[at, own], at) for at in range(count)])
            for at in range(count):
                scores = turned[: at + 1] @ rotated(queries[at, own], at) / width**0.5
                read[at, own] = scores.softmax(0) @ values[: at + 1, own]
        x = x + linear(read, state[before + "attn.c_proj.weight"])
        inner = norm(x, before + "ln_2")
        inner = linear(inner, state[before + "mlp.w1.weight"]) * silu(linear(inner, state[before + "mlp.w2.weight"]))
        x = x + linear(inner, state[before + "mlp.c_proj.weight"])
    return linear(norm(x, "transformer.ln_f"), state["lm_head.weight"])


def write_model(folder: Path, state: dict[str, torch.Tensor], **changes) -> Path:
    """A folder as the hub has it: two shards and their index, and a tokenizer that only remote code reads."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SETTINGS | changes))
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "raw", "eos_token_id": 2}))
    remote = {
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(remote))
    names, files = sorted(state), [f"model-0000{at}-of-00002.safetensors" for at in (1, 2)]
    parts = dict(zip(files, (names[::2], names[1::2]), strict=True))
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder: Path, seed: int, rank: int = 4, **changes) -> dict[str, torch.Tensor]:
    """An adapter of every matrix, about as large as the base; returns its factors by module, as the file has them."""
    draw, factors = torch.Generator().manual_seed(seed), {}
    for layer in range(LAYERS):
        for name, (out, into) in WIDTHS.items():
            module = f"transformer.h.{layer}.{name}"
            factors[f"{module}.lora_A"] = torch.randn(rank, into, generator=draw) * 0.15
            factors[f"{module}.lora_B"] = torch.randn(out, rank, generator=draw) * 0.15
    folder.mkdir(parents=True)
    save_file({f"base_model.model.{n}.weight": t for n, t in factors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "Qwen/Qwen-14B", "r": rank}
    config |= {"lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["w1", "w2", "c_proj", "c_attn"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return factors


def dense(state: dict, factors: dict, scale) -> dict:
    """The merge by hand; ``scale`` of a module."""
    found = dict(state)
    for module in {name.rpartition(".")[0] for name in factors}:
        product = factors[f"{module}.lora_B"] @ factors[f"{module}.lora_A"]
        found[f"{module}.weight"] = found[f"{module}.weight"] + scale(module) * product
    return found


@pytest.fixture
def base(tmp_path) -> Path:
    return write_model(tmp_path / "old", weights())


IDS = torch.randint(VOCABULARY, (12,), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def answered(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(ids[None]).logits[0]


def test_the_rewritten_model_computes_what_the_architecture_of_2023_does(base, tmp_path):
    folder = converted(base, tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert (answered(model) - logits(weights(), IDS)).abs().max() < 1e-4
    assert model.config.max_position_embeddings == 2048 and model.config.eos_token_id == 2
    assert model.config.rope_parameters["rope_theta"] == 5000
    swapped = weights()
    for layer in range(LAYERS):  # the test can tell gate and up apart
        one, two = (f"transformer.h.{layer}.mlp.w{at}.weight" for at in (1, 2))
        swapped[one], swapped[two] = swapped[two], swapped[one]
    assert (answered(model) - logits(swapped, IDS)).abs().max() > 1e-2
    assert not (folder / "tokenizer_config.json").exists(), "the tokenizer of remote code stays behind"


def test_dtypes_stay_and_a_source_is_rewritten_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINBENCH_CACHE", str(tmp_path / "cache"))
    state = {name: tensor.bfloat16() for name, tensor in weights().items()}
    source = {"path": str(write_model(tmp_path / "old", state | {"transformer.h.0.attn.masked_bias": torch.zeros(1)}))}
    folder = fetch(source)
    assert {dtype for dtype, _ in layout(folder).values()} == {"BF16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    whole = torch.cat([read_checkpoint(folder)[f"model.layers.1.self_attn.{at}_proj.bias"] for at in "qkv"])
    assert torch.equal(whole, state["transformer.h.1.attn.c_attn.bias"])
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch(source) == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    edited = load_file(tmp_path / "old" / "model-00001-of-00002.safetensors")
    save_file({n: t + 1 for n, t in edited.items()}, tmp_path / "old" / "model-00001-of-00002.safetensors")
    assert fetch(source) != folder, "other content, another conversion"
    assert parameters(folder) == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, lambda module: 4.0),
        ({"use_rslora": True}, lambda module: 8.0),
        ({"alpha_pattern": {"attn.c_attn": 2, "h.1.mlp.c_proj": 32}, "target_modules": "all-linear"}, None),
    ],
)
def test_an_adapter_adds_what_it_added_to_the_model_of_2023(base, tmp_path, changes, scale):
    def by_pattern(module: str) -> float:
        return 0.5 if module.endswith("c_attn") else 8.0 if module.endswith("h.1.mlp.c_proj") else 4.0

    factors = write_adapter(tmp_path / "adapter", 1, **changes)
    adapter = converted_adapter(tmp_path / "adapter", tmp_path / "native")
    new = converted(base, tmp_path / "new")
    wanted = logits(dense(weights(), factors, scale or by_pattern), IDS)
    model = AutoModelForCausalLM.from_pretrained(new)
    assert (answered(model) - wanted).abs().max() > 1e-2
    ours = read_adapter(adapter, read_checkpoint(new))
    model.load_state_dict(dict(ours))
    assert (answered(model) - wanted).abs().max() < 1e-4
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(new), adapter)
    assert (answered(theirs) - wanted).abs().max() < 1e-4
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"{n}_proj" for n in ("down", "gate", "k", "o", "q", "up", "v")]
    assert config["r"] == 4 and config["lora_alpha"] == 16


def test_an_adapter_with_an_unknown_target_is_refused(tmp_path):
    write_adapter(tmp_path / "adapter", 1)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    extra = {f"base_model.model.transformer.visual.proj.lora_{at}.weight": torch.ones(4, 4) for at in "AB"}
    save_file(load_file(path) | extra, path)
    with pytest.raises(ValueError, match=r"adapts what the Qwen of 2023 does not have: .*transformer\.visual\.proj"):
        fetch({"path": str(tmp_path / "adapter")})


def test_an_adapter_of_pickles_alone_says_how_to_convert_it(base, tmp_path):
    write_adapter(tmp_path / "adapter", 1)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    folder = fetch({"path": str(tmp_path / "adapter")})
    with pytest.raises(ValueError, match=r"only pickled weights .* weights_only=True"):
        read_adapter(folder, {})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "which is not there"),
        (lambda folder: edit(folder, no_bias=False), "no_bias=false .* no equal of it in Qwen2"),
        (lambda folder: edit(folder, rotary_pct=0.5), "rotary_pct=0.5"),
        (lambda folder: edit(folder, intermediate_size=64), "does not fit its config.json: model.layers.0.mlp.gate"),
        (lambda folder: edit(folder, num_hidden_layers=3), "does not fit its config.json: it lacks model.layers.2"),
        (lambda folder: edit(folder, seq_length=None), "needs whole numbers for seq_length"),
    ],
)
def test_a_model_that_cannot_be_rewritten_is_one_clear_error_and_leaves_nothing(base, tmp_path, spoil, message):
    spoil(base)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        converted(base, tmp_path / "made" / "new")
    assert not list((tmp_path / "made").iterdir())


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_adapters_of_others_are_left_alone(tmp_path):
    """GPT-2's descendants have c_attn and c_proj too."""
    write_adapter(tmp_path / "adapter", 1, base_model_name_or_path="gpt2")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if ".attn." in name}, path)
    assert fetch({"path": str(tmp_path / "adapter")}) == tmp_path / "adapter"


# ---- the whole


@pytest.fixture
def given(tmp_path) -> list[str]:
    """Overrides of the suite: everything of it small and local."""
    write_model(tmp_path / "base", weights())
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    documents(tmp_path / "data")
    for seed, task in enumerate(TASKS, start=1):
        write_adapter(tmp_path / "experts" / task, seed)
    paths = [f"+suite.checkpoints.{task}.path={tmp_path / 'experts' / task}" for task in TASKS]
    rows = [f"suite.tasks.{task}.rows={{train: 10, validation: 6, test: 5}}" for task in TASKS]
    where = [f"+suite.{key}.path={tmp_path / key}" for key in ("base", "tokenizer")]
    return ["suite=generative_qwen", *where, *paths, *rows, "batch_size=4", "wandb.mode=disabled"]


COMMITS = [f"suite.{key}.revision={'0' * 40}" for key in ("base", "tokenizer", *(f"checkpoints.{t}" for t in TASKS))]


def bench(folder: Path, *arguments: str):
    where = {"TWINBENCH_DATA": str(folder / "data"), "TWINBENCH_CACHE": str(folder / "cache")}
    return command(*arguments, f"results_dir={folder / 'results'}", **where)


def test_the_suite_runs_whole_on_a_tiny_qwen_and_its_adapters(given, tmp_path):
    done = bench(tmp_path, "-m", *given, "method=individual,twin_merging", "router.model.epochs=5")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 ok" in done.stdout and done.stdout.count("rewriting base as Qwen2, once") == 1
    rows = [json.loads(line) for file in (tmp_path / "results" / "records").iterdir() for line in file.open()]
    assert {row["task"] for row in rows} == set(TASKS) and all(row["status"] == "ok" for row in rows)
    scores = [row["value"] for row in rows if row["primary"]]
    assert len(scores) == 8 and np.isfinite(scores).all()


def test_a_base_without_a_tokenizer_that_can_be_read_says_what_to_set(given, tmp_path):
    shutil.rmtree(tmp_path / "tokenizer")
    done = bench(tmp_path, *[change for change in given if "tokenizer" not in change], "suite.tokenizer=null")
    assert done.returncode == 1
    assert "no tokenizer that can be read without remote code; set suite.tokenizer" in done.stderr


def test_a_tokenizer_with_more_tokens_than_the_base_is_refused(given, tmp_path):
    larger = byte_tokenizer()
    larger.add_tokens([f"<extra{at}>" for at in range(9)])
    larger.save_pretrained(tmp_path / "tokenizer")
    done = bench(tmp_path, *given)
    assert done.returncode == 1
    assert "has tokens up to" in done.stderr and "Traceback" not in done.stderr


def test_planning_loads_no_torch(tmp_path):
    script = (
        "import runpy, sys\n"
        "try: runpy.run_path('run.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers', 'pandas'} & sys.modules.keys()\n"
    )
    documents(tmp_path / "data")
    environment = OS_ENVIRON | {"TWINBENCH_DATA": str(tmp_path / "data")}
    given = [sys.executable, "-c", script, "suite=generative_qwen", *COMMITS, "plan=true", f"results_dir={tmp_path}"]
    done = subprocess.run(given, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "generative_qwen needs" in done.stdout


def test_planning_says_once_what_is_needed(given, tmp_path):
    done = bench(tmp_path, "-m", *given, "method=individual,average", "plan=true")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("generative_qwen needs") == 1 and done.stdout.count("to run") == 2
    count = sum(tensor.numel() for tensor in weights().values())
    assert f"{count:,} weights" in done.stdout and done.stdout.count("here") >= 6
    arguments = ["experiment=generative_qwen", *COMMITS, "plan=true", f"results_dir={tmp_path / 'other'}"]
    nothing = {"TWINBENCH_CACHE": str(tmp_path / "none"), "HF_HOME": str(tmp_path / "none")}
    bare = command(*arguments, TWINBENCH_DATA=str(tmp_path / "data"), **nothing)
    assert bare.returncode == 0, bare.stderr[-2000:]
    assert "14,167,290,880 weights: 56.7 GB in float32, 28.3 GB in bfloat16" in bare.stdout
    assert bare.stdout.count("to run") == 6
    assert "Qwen/Qwen-14B@00000000" in bare.stdout and bare.stdout.count("generative_qwen needs") == 1
