"""LoRA adapters as experts, against a delta written out by hand."""

import json
import math

import peft
import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn
from transformers import BertForSequenceClassification

from baselines import task_arithmetic
from support.family import tiny_config
from twinbench.export.lora import lora, split
from twinbench.weights.lora import CHANGES_BASE, PREFIX, by_pattern, read_adapter, read_factors
from twinbench.weights.parts import LowRank, dense

SHAPES = {
    "embed.weight": (10, 4),
    "layer.0.query.weight": (6, 4),
    "layer.0.query.bias": (6,),
    "layer.1.query.weight": (6, 4),
    "down.weight": (4, 6),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base_state(dtype=torch.float32) -> dict:
    return {name: draw(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(SHAPES.items())}


def factors(module: str, d_in: int, d_out: int, rank: int, seed: int = 7) -> dict:
    a, b = draw(rank, d_in, seed=seed), draw(d_out, rank, seed=8)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def write(folder, tensors: dict, **config):
    folder.mkdir(exist_ok=True)
    file = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(file, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "init_lora_weights": True} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def product(tensors: dict, module: str) -> torch.Tensor:
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 2), (True, 6 / math.sqrt(2))])
def test_an_adapted_matrix_is_base_plus_scaled_product_and_the_rest_is_the_base(tmp_path, rslora, scale):
    base, tensors = base_state(), factors("layer.0.query", 4, 6, 2)
    expert = read_adapter(write(tmp_path / "a", tensors, use_rslora=rslora), base)
    assert list(expert) == list(base)
    expected = base["layer.0.query.weight"] + scale * product(tensors, "layer.0.query")
    torch.testing.assert_close(expert["layer.0.query.weight"], expected)
    assert all(torch.equal(expert[name], base[name]) for name in base if name != "layer.0.query.weight")
    assert torch.equal(base["layer.0.query.weight"], base_state()["layer.0.query.weight"])


def test_patterns_give_modules_their_own_rank_and_alpha(tmp_path):
    base = base_state()
    tensors = factors("layer.0.query", 4, 6, 3) | factors("layer.1.query", 4, 6, 2)
    patterns = {"rank_pattern": {"0.query": 3, "query": 2}, "alpha_pattern": {r"layer\.1\..*": 5}}
    expert = read_adapter(write(tmp_path / "a", tensors, r=1, **patterns), base)
    for module, scale in (("layer.0.query", 6 / 3), ("layer.1.query", 5 / 2)):
        expected = base[f"{module}.weight"] + scale * product(tensors, module)
        torch.testing.assert_close(expert[f"{module}.weight"], expected)


PLACES = ((0, 4, 6, 2), (1, 9, 5, 2), (2, 3, 4, 1))  # of layers: position, rows, columns, rank
MODULES = [
    "v_proj",
    "a.v_proj",
    "a.kv_proj",
    "a.v_proj.x",
    "a.v_proj_x",
    "a.bXv_proj",
    "a.b.v_proj",
    "layers.11.v_proj",
]


@pytest.mark.parametrize(
    "patterns",
    [
        ["v_proj"],
        ["kv_proj", "v_proj"],
        ["b.v_proj"],
        ["^v_proj"],
        ["^a.v_proj", "v_proj"],
        ["^v_proj$", ".*"],
        [r"layers\.1\.v_proj"],
        [r"layers\.\d+\.v_proj", "11.v_proj"],
        ["[kv]+_proj", "v_proj|x"],
        ["v_proj|x", "[kv]+_proj"],
        ["proj", "v_pro"],
        [],
    ],
)
def test_patterns_match_what_they_match_in_peft(patterns):
    values = {pattern: value for value, pattern in enumerate(patterns)}
    for module in MODULES:
        assert by_pattern(module, values, -1) == values.get(get_pattern_key(values, module), -1), module


class Attention(nn.Module):
    """Names of which one is the end of the other."""

    def __init__(self):
        super().__init__()
        self.v_proj, self.kv_proj, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.out(self.v_proj(x) + self.kv_proj(x))


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 9}},
        {"rank_pattern": {"^1.out": 3, "out": 4}, "alpha_pattern": {"k?v_proj": 1, "kv_proj": 7}, "use_rslora": True},
        {"bias": "all"},
    ],
)
def test_an_adapter_that_peft_wrote_makes_the_model_that_peft_makes_of_it(tmp_path, settings):
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(), Attention()), draw(5, 6)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets = ["v_proj", "kv_proj", "out"]
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False, **settings)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter += 0.1 * torch.ones_like(parameter) * ("bias" in name and "bias" in settings)
    adapted.save_pretrained(tmp_path)
    wanted, whole = adapted(x), nn.Sequential(Attention(), Attention())
    whole.load_state_dict(dict(read_adapter(tmp_path, base)))
    torch.testing.assert_close(whole(x), wanted)
    if "bias" not in settings:
        factored = read_factors(tmp_path, base)
        whole.load_state_dict(base | {name: base[name] + dense(part) for name, part in factored.items()})
        torch.testing.assert_close(whole(x), wanted)


def test_weights_stored_as_in_out_and_embeddings_are_transposed(tmp_path):
    base, tensors = base_state(), factors("down", 4, 6, 2)
    expert = read_adapter(write(tmp_path / "a", tensors, fan_in_fan_out=True), base)
    torch.testing.assert_close(expert["down.weight"], base["down.weight"] + 3 * product(tensors, "down").T)
    a, b = draw(2, 10, seed=1), draw(4, 2, seed=2)
    embedding = {"embed.lora_embedding_A": a, "embed.lora_embedding_B": b}
    expert = read_adapter(write(tmp_path / "b", embedding, task_type="FEATURE_EXTRACTION"), base)
    torch.testing.assert_close(expert["embed.weight"], base["embed.weight"] + 3 * (b @ a).T)


def test_tensors_saved_in_full_replace_the_base_and_a_head_is_added(tmp_path):
    base, bias, embed, head = base_state(), draw(6, seed=3), draw(10, 4, seed=4), draw(2, 4, seed=5)
    tensors = factors("layer.0.query", 4, 6, 2) | {"layer.0.query.base_layer.bias": bias, "embed.weight": embed}
    folder = write(tmp_path / "a", tensors | {"score.weight": head}, modules_to_save=["embed", "score"], bias="all")
    expert = read_adapter(folder, base)
    assert list(expert) == [*base, "score.weight"]
    assert torch.equal(expert["layer.0.query.bias"], bias)
    assert torch.equal(expert["embed.weight"], embed)
    assert torch.equal(expert["score.weight"], head)


def test_tensors_saved_in_full_have_the_bases_dtype_and_a_head_keeps_its_own(tmp_path):
    base, bias, score = base_state(torch.bfloat16), draw(6, seed=3), draw(2, 4)
    folder = write(tmp_path / "a", {"layer.0.query.bias": bias, "score.weight": score}, modules_to_save=["score"])
    expert = read_adapter(folder, base)
    assert torch.equal(expert["layer.0.query.bias"], bias.to(torch.bfloat16))
    assert expert["score.weight"].dtype == torch.float32


def test_the_delta_is_formed_and_kept_in_float32_beside_a_base_of_fewer_digits(tmp_path):
    base, tensors = base_state(torch.bfloat16), factors("layer.0.query", 4, 6, 2)
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    found = read_adapter(write(tmp_path / "a", tensors), base)["layer.0.query.weight"]
    delta = 3 * product({name: tensor.float() for name, tensor in tensors.items()}, "layer.0.query")
    exact = base["layer.0.query.weight"].float() + delta
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)


def test_experts_of_other_rank_and_other_targets_merge_as_whole_deltas(tmp_path):
    base = base_state()
    first = factors("layer.0.query", 4, 6, 2, seed=10) | factors("down", 6, 4, 2, seed=11)
    second = factors("layer.0.query", 4, 6, 3, seed=12)
    experts = {
        "first": read_adapter(write(tmp_path / "a", first), base),
        "second": read_adapter(write(tmp_path / "b", second, r=3), base),
    }
    merged = task_arithmetic.merge(base, experts, scaling=0.5).shared
    both = 3 * product(first, "layer.0.query") + 2 * product(second, "layer.0.query")
    torch.testing.assert_close(merged["layer.0.query.weight"], base["layer.0.query.weight"] + 0.5 * both)
    torch.testing.assert_close(merged["down.weight"], base["down.weight"] + 1.5 * product(first, "down"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True, "use_dora": True}, "use_dora=True, lora_bias=True"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        *(({"init_lora_weights": name}, f"'{name}', which changes the base") for name in CHANGES_BASE),
        ({"init_lora_weights": "PiSSA_niter_4"}, "which changes the base"),
        ({"r": "many"}, "not the configuration of a LoRA adapter"),
    ],
)
def test_unsupported_adapters_are_named(tmp_path, config, words):
    with pytest.raises(ValueError, match=words):
        read_adapter(write(tmp_path / "a", factors("layer.0.query", 4, 6, 2), **config), base_state())


def test_parts_written_as_an_adapter_are_read_as_the_same_parts(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4), nn.Embedding(9, 5), nn.Linear(4, 3), nn.LayerNorm(3))
    parts = {f"{at}.weight": LowRank(draw(out, rank), draw(rank, into, seed=1)) for at, out, into, rank in PLACES}

    def written(name, parts):
        config, tensors = lora(parts, model)
        assert config["inference_mode"]
        return write(tmp_path / name, {key.removeprefix(PREFIX): t for key, t in tensors.items()}, **config)

    read = read_factors(written("a", parts), model.state_dict())
    assert set(read) == set(parts)
    for name, part in parts.items():
        torch.testing.assert_close(tuple(read[name]), tuple(part))
    (nothing,) = read_factors(written("b", {}), model.state_dict()).values()
    assert not dense(nothing).any() and dense(nothing).shape == (4, 6)
    for name, owner in (("3.weight", "LayerNorm"), ("2.bias", "Linear")):
        with pytest.raises(ValueError, match=rf"hold the weights of Linear and Embedding; {name} belongs to a {owner}"):
            lora({name: LowRank(draw(3, 1), draw(1, 1))}, model)
    with pytest.raises(ValueError, match="LayerNorm has no Linear, so no LoRA adapter fits it"):
        lora({}, model[3])
    with pytest.raises(ValueError, match=r"expert a: b is not low-rank.*method\.compression=svd"):
        split({"a": draw(3), "b": draw(3, 2)}, "a")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("IA3", {"feedforward_modules": []}),
        ("LoHa", {"r": 2}),
        ("LoKr", {"r": 2}),
        ("OFT", {"oft_block_size": 4}),
        ("Vera", {"r": 2}),
        ("AdaLora", {"target_r": 2, "total_step": 10}),
        ("HRA", {"r": 2}),
    ],
)
def test_pefts_other_kinds_are_refused_by_their_name(tmp_path, kind, settings):
    model = BertForSequenceClassification(tiny_config())
    config = getattr(peft, f"{kind}Config")(target_modules=["query"], **settings)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    for read in (read_adapter, read_factors):
        with pytest.raises(ValueError, match=f"peft_type is {kind.upper()}; of PEFT's adapters only LORA"):
            read(tmp_path, model.state_dict())


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {k: t for m in "abcd" for k, t in factors(m, 4, 6, 2).items()},
            r"base, which lacks a.weight, b.weight, c.weight \(\+1 more\)",
        ),
        (factors("layer.0.query", 5, 6, 2), r"layer.0.query.weight is \[6, 4\], A \[2, 5\] and B \[6, 2\]"),
        (factors("layer.0.query", 4, 6, 4), r"A \[4, 4\] and B \[6, 4\], adapter_config.json says rank 2"),
        ({"embed.weight": draw(9, 4)}, r"embed.weight is \[10, 4\], the adapter's \[9, 4\]"),
        ({"score.weight": draw(2, 4)}, "base, which lacks score.weight"),
        ({"down.lora_A.weight": draw(2, 6)}, "lora_A or lora_B missing for down"),
        ({"down.lora_magnitude_vector": draw(4)}, "not supported: base_model.model.down.lora_magnitude_vector"),
        (
            {"down.lora_A.weight": draw(2, 4, 3, 3), "down.lora_B.weight": draw(6, 2, 1, 1)},
            "down.weight is no matrix",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_named_before_any_delta_is_formed(tmp_path, tensors, words):
    with pytest.raises(ValueError, match=words):
        read_adapter(write(tmp_path / "a", tensors), base_state())


def test_missing_and_pickled_files(tmp_path):
    folder = write(tmp_path / "a", factors("down", 6, 4, 2))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        read_adapter(folder, base_state())
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="only pickled weights"):
        read_adapter(folder, base_state())
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path, base_state())
