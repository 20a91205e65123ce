"""Merging from disk to disk: whole models, sharded ones, adapters, classifiers whose heads are left out."""

import functools
import math
import re
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from baselines import lines, magmax, task_arithmetic, ties
from support.commands import OS_ENVIRON, ROOT
from support.family import CLASSES, edit_weights, tokenizer
from twinbench.merge import card, check, merge
from twinbench.weights.state_dict import read_checkpoint

HALF = functools.partial(task_arithmetic.merge, scaling=0.5)
LIMIT = 5 * 10**9


def llama(folder, seed: int, **saving):
    set_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=44, **sizes, tie_word_embeddings=True)).to(torch.bfloat16)
    model.save_pretrained(folder, **saving)
    tokenizer().save_pretrained(folder)
    return model


@pytest.fixture
def models(tmp_path):
    """A sharded causal LM in bfloat16, an expert of the same kind, and an adapter."""
    llama(tmp_path / "base", 0, max_shard_size="4KB")
    llama(tmp_path / "whole", 1)
    set_seed(2)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig("CAUSAL_LM", r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_a_sharded_language_model_an_expert_and_an_adapter(models):
    experts = {"whole": models / "whole", "adapter": models / "adapter"}
    size = merge(models / "base", experts, HALF, models / "out", 4000, "# a card\n")
    assert len(list((models / "out").glob("model-*-of-*.safetensors"))) > 2
    assert size == sum(file.stat().st_size for file in (models / "out").glob("*.safetensors"))
    assert (models / "out" / "README.md").read_text() == "# a card\n"
    base, whole = (AutoModelForCausalLM.from_pretrained(models / name).float() for name in ("base", "whole"))
    adapter = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models / "base").float(), models / "adapter"
    ).merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(models / "out")
    for name, parameter in base.named_parameters():
        deltas = [expert.get_parameter(name).data - parameter.data for expert in (whole, adapter)]
        wanted = parameter.data + 0.5 * sum(deltas)
        got = found.get_parameter(name).data
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=2**-8, atol=1e-6)  # the result's rounding alone
    assert found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    assert (models / "out" / "tokenizer.json").read_bytes() == (models / "base" / "tokenizer.json").read_bytes()


def test_classifiers_are_merged_without_their_heads(family, tmp_path, capsys):
    experts = {task: family / "experts" / task for task in CLASSES}
    method = functools.partial(ties.merge, density=0.3, scaling=1.0, scope="global", aggregate="mean")
    merge(family / "base", experts, method, tmp_path / "out", LIMIT, "")
    assert "so the bare BertModel is merged" in capsys.readouterr().out
    base = load_file(family / "base" / "model.safetensors")
    states = {
        task: {name.removeprefix("bert."): t for name, t in load_file(folder / "model.safetensors").items()}
        for task, folder in experts.items()
    }
    base, *states = ({n: t for n, t in state.items() if "pooler" not in n} for state in (base, *states.values()))
    wanted, found = method(base, dict(enumerate(states))).shared, AutoModel.from_pretrained(tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == wanted.keys()
    assert all(torch.equal(wanted[name], found.state_dict()[name]) for name in wanted)


def test_weights_that_are_not_finite_are_named_and_nothing_is_left(models):
    def spoil(state):
        return state | {"model.norm.weight": torch.full_like(state["model.norm.weight"], torch.nan)}

    edit_weights(models / "whole", spoil)
    before = sorted(models.iterdir())
    with pytest.raises(ValueError, match=r"expert whole: NaN or infinite weights in model\.norm\.weight"):
        merge(models / "base", {"expert whole": models / "whole"}, HALF, models / "out", LIMIT, "")
    assert sorted(models.iterdir()) == before


def test_a_result_beyond_its_dtype_is_refused(models):
    def grow(state):
        return {name: (t.float() * 0 + 3e38).to(t.dtype) if "norm" in name else t for name, t in state.items()}

    edit_weights(models / "whole", grow)
    twice = functools.partial(task_arithmetic.merge, scaling=2.0)
    with pytest.raises(ValueError, match="the merged model: NaN or infinite weights"):
        merge(models / "base", {"whole": models / "whole"}, twice, models / "out", LIMIT, "")


def test_the_card_says_what_was_merged():
    sources = {"base": {"hub": "me/base", "revision": "abc"}, "math": {"path": "math"}}
    text = card("ties", {"density": 0.2}, sources)
    assert "base_model: me/base\n" in text
    assert '| math | `{"path": "math"}` |' in text
    assert '| parameters | `{"density": 0.2}` |' in text


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "twinbench.merge", *arguments],
        cwd=ROOT,
        env=OS_ENVIRON | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_command_line(models):
    out = models / "out"
    given = [f"base={models / 'base'}", f"experts={{a: {models / 'whole'}}}", f"out={out}"]
    done = command("method=task_arithmetic", "method.scaling=1.0", *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {out}: ")
    merged, expert = read_checkpoint(out), read_checkpoint(models / "whole")
    assert all(torch.equal(merged[name], expert[name]) for name in expert)
    again = command(*given)
    assert again.returncode == 1
    assert again.stderr.strip() == f"error: {out} exists and is not an empty folder; remove it or choose another name"


LOW_RANK = """
from twinbench.merging.compress import svd
from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict


def merge(base, experts, *, basis):
    (expert,) = experts.values()
    rank_one = lambda name: base[name] + svd(expert[name].float() - base[name].float(), 1, basis).dense()
    return Merged(StateDict(base, lambda name: rank_one(name).bfloat16() if base[name].dim() > 1 else base[name]))
"""


def test_a_method_gets_what_reads_no_data(models):
    """The basis of each difference is remembered as in a run."""
    (models / "ours.py").write_text(LOW_RANK)
    given = [f"base={models / 'base'}", f"experts={{a: {models / 'whole'}}}", f"out={models / 'out'}"]
    asked = ["method=average", "method._target_=ours.merge", "allow=[ours]"]
    done = command(*given, *asked, PYTHONPATH=str(models), TWINBENCH_CACHE=str(models / "cache"))
    assert done.returncode == 0, done.stderr
    base, whole, merged = (read_checkpoint(models / name) for name in ("base", "whole", "out"))
    name = "model.layers.0.mlp.down_proj.weight"
    u, s, v = torch.linalg.svd(whole[name].float() - base[name].float(), full_matrices=False)
    wanted = base[name].float() + s[0] * u[:, :1] @ v[:1]
    torch.testing.assert_close(merged[name].float(), wanted, rtol=2**-7, atol=1e-5)
    assert list((models / "cache" / "factors").glob("*.safetensors"))


def test_a_modifier_is_given_what_the_static_method_made(models):
    given = [f"base={models / 'base'}", f"experts={{a: {models / 'whole'}}}", f"out={models / 'out'}"]
    done = command(*given, "method=lines", "method.slope=0.5", "method@shared=magmax", "shared.scaling=0.8")
    assert done.returncode == 0, done.stderr
    base, whole, merged = (read_checkpoint(models / name) for name in ("base", "whole", "out"))
    made = magmax.merge(base, {"a": whole}, scaling=0.8).shared
    wanted = lines.merge(base, {"a": whole}, shared=made, intercept=None, slope=0.5).shared
    assert all(torch.equal(merged[name], wanted[name]) for name in base)
    assert '"shared": {"method": "magmax", "scaling": 0.8}' in (models / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["method=fisher"],
            "error: method=fisher needs fisher, which reads training inputs, and here are weights alone; a suite has "
            "data, and its experts are merged by python run.py suite=NAME method=fisher export=DIR",
        ),
        (["method=regmean"], "error: method=regmean needs gram, which reads training inputs"),
        (["method=ties", "method.density=7"], "error: density must be in (0, 1], got 7"),
        (["method=tiess"], "error: unknown method 'tiess'; did you mean 'ties'?"),
        (["experts={a: nowhere}"], "error: source path nowhere does not exist"),
        (
            ["experts=A,B"],
            "error: 'experts=A,B' has several values: KEY=[A,B] is a list, KEY='{a: A, b: B}' gives them names",
        ),
        (["experts=???"], "error: experts is missing; give experts=VALUE"),
    ],
)
def test_mistakes_on_the_command_line(family, tmp_path, arguments, words):
    given = {"base": family / "base", "experts": f"{{a: {family / 'base'}}}", "out": tmp_path / "out"}
    overrides = [f"{key}={value}" for key, value in given.items()]
    done = command(*overrides, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


SETTINGS = {
    "base": "base",
    "experts": {"a": "a"},
    "out": "out",
    "seed": 0,
    "allow": [],
    "shard_bytes": LIMIT,
    "method": {"_target_": "baselines.task_arithmetic.merge", "_partial_": True, "scaling": 0.3},
}
SETTINGS["shared"] = SETTINGS["method"]
NAMES = {"method": "M", "shared": "S"}
LINES = {"_target_": "baselines.lines.merge", "_partial_": True, "intercept": None, "slope": 0.4}
INDIVIDUAL = {"_target_": "baselines.individual.merge", "_partial_": True}
SMILE = {"_target_": "baselines.smile.merge", "_partial_": True, "rank": 32, "gate_rank": 1, "top_k": 1}
TWIN = {
    "_target_": "twinbench.merging.twin_merging.merge",
    "_partial_": True,
    "compression": "svd",
    "rank_ratio": 0.1,
    "density": None,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": "nowhere"}, "experts must map names to sources, experts='{a: DIR, b: DIR}'; got 'nowhere'"),
        ({"experts": ["a"]}, "experts must map names to sources"),
        ({"experts": {"../a": "a"}}, "expert '../a' is no name"),
        ({"experts": {"a": 3}}, "a must be a folder or a source such as {path: DIR}, got 3"),
        ({"experts": {"base": "a"}}, "the name base is the base's own"),
        ({"base": ""}, "base must be a folder or a source such as {path: DIR}, got ''"),
        ({"out": ""}, "out must be a new folder, got ''"),
        ({"seed": "abc"}, "seed must be a whole number in [0, 2^32), got 'abc'"),
        ({"shard_bytes": "abc"}, "shard_bytes must be a whole number of at least 1, got 'abc'"),
        ({"method": INDIVIDUAL}, "gives each task a model of its own, and no command writes these to disk"),
        ({"method": SMILE}, "gives each linear layer experts of its own, and no command writes these to disk"),
        ({"method": TWIN}, "is written so by python run.py suite=NAME method=M export=DIR"),
        ({"method": LINES, "shared": LINES}, "method@shared=S gives a shared model with adapters"),
        ({"method": LINES, "shared": SMILE}, "method@shared=S gives each linear layer experts of its own"),
        ({"method": {"_target_": "os.system", "_partial_": True}}, "only functions in baselines and twinbench"),
        (
            {"method": SETTINGS["method"] | {"scaling": math.nan}},
            "method.scaling must be a finite number (float32), got nan",
        ),
    ],
)
def test_mistakes_in_what_is_composed(changes, words):
    check(SETTINGS, NAMES)
    assert check(SETTINGS | {"method": LINES}, NAMES).keys() == {"method", "shared"}
    with pytest.raises(ValueError, match=re.escape(words)):
        check(SETTINGS | changes, NAMES)
