"""Factored merges of PEFT's own LoRA adapters, against the dense merges of the same adapters."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from baselines import average, dare, individual, pretrained, task_arithmetic, ties
from baselines import expert as one_expert
from support.language import generated, left_padded, log_likelihoods, prompts
from twinbench.merging import twin_merging
from twinbench.merging.compress import basis
from twinbench.merging.factored import coefficients, exclusive, linear, separate, static, truncated
from twinbench.merging.merged import Merged, materialize, with_route
from twinbench.merging.method import Method, factored
from twinbench.routing.attach import attach
from twinbench.weights.lora import read_adapter, read_factors
from twinbench.weights.parts import LowRank, dense

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}  # d_min is 32 everywhere
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3}
SETTINGS = SIZES | HEADS | TOKENS
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SETTINGS)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SETTINGS)),
}
ADAPTERS = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "rslora": {"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
    "fewer": {"r": 2, "lora_alpha": 1, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5}},
}
ADAPTED = 2 * 7  # matrices in two layers
SCALING = 0.3
WEIGHTS = torch.tensor([[1, 0, 0], [0.2, 0.3, 0.5], [0, 0, 1], [0.05, 0.9, 0.05]])  # of the rows of `prompts`


@pytest.fixture(scope="module", params=MODELS)
def family(request, tmp_path_factory):
    """A model, and the folders of adapters that PEFT wrote for it."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # Qwen2's are made as zeros
                parameter.normal_(std=0.3)
    root = tmp_path_factory.mktemp(request.param)
    for name, settings in ADAPTERS.items():
        adapted(model, settings).save_pretrained(root / name)
    return model, {name: root / name for name in ADAPTERS}


def adapted(model, settings: dict):
    return get_peft_model(copy.deepcopy(model), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings))


def state(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def dense_merge(model, folders, rank: int) -> Merged:
    """Of whole experts, by the methods of the benchmark."""
    base = state(model)
    experts = {name: read_adapter(folder, base) for name, folder in folders.items()}
    shared = dict(task_arithmetic.merge(base, experts, scaling=SCALING).shared)
    settings = {"compression": "svd", "rank_ratio": rank / 32, "density": None, "seed": 0, "basis": basis}
    merged = materialize(twin_merging.merge(base, experts, shared=shared, **settings))
    vectors = [name for name, tensor in base.items() if tensor.dim() < 2]
    assert not any(name in parts for name in vectors for parts in merged.exclusive.values()), "LoRA leaves them alone"
    return merged


def factored_merge(folders, rank: int) -> tuple[dict, dict]:
    adapters = {name: read_factors(folder) for name, folder in folders.items()}
    shared = linear(adapters, dict.fromkeys(adapters, SCALING))
    return shared, exclusive(adapters, shared, rank / 32)


def twin(base, adapters, rank_ratio: float, shared=None, compression: str = "svd") -> Merged:
    """Twin-Merging of factors, beside Task Arithmetic's shared expert or a given one."""
    settings = {"compression": compression, "rank_ratio": rank_ratio, "density": None, "seed": 0, "basis": basis}
    return twin_merging.factored(base, adapters, shared=shared or static(scaled(SCALING), base, adapters), **settings)


def scaled(scaling: float):
    return lambda base, experts: task_arithmetic.merge(base, experts, scaling=scaling)


def equal(adapters, coefficient: float) -> dict[str, float]:
    return dict.fromkeys(adapters, coefficient)


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(d_out=12, d_in=9, rank=4, seed=0) -> LowRank:
    return LowRank(draw(d_out, rank, seed=seed), draw(rank, d_in, seed=100 + seed))


def test_factors_are_what_peft_adds_to_its_base(family):
    model, folders = family
    for name, folder in folders.items():
        base, parts = state(model), read_factors(folder, state(model))
        merged = state(PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload())
        changed = {key for key in base if not torch.equal(base[key], merged[key])}
        assert changed == set(parts)
        assert len(parts) == (2 * 2 if name == "fewer" else ADAPTED)
        for key, part in parts.items():
            torch.testing.assert_close(dense(part), merged[key] - base[key], atol=1e-5, rtol=0)
    assert {part.left.shape[1] for part in parts.values()} == {2, 5}


def test_the_shared_difference_is_that_of_dense_task_arithmetic(family):
    model, folders = family
    base, expected = state(model), dense_merge(model, folders, 1).shared
    shared, _ = factored_merge(folders, 1)
    for name, origin in base.items():
        found = dense(shared[name]) if name in shared else torch.zeros_like(origin)
        torch.testing.assert_close(found, expected[name] - origin, atol=1e-5, rtol=0)
    query = shared["model.layers.0.self_attn.q_proj.weight"]
    assert (query.left.shape[1], query.right.shape[0]) == (4 + 3 + 2, 4 + 3 + 2)
    assert shared["model.layers.0.mlp.up_proj.weight"].left.shape[1] == 4 + 3


@pytest.mark.parametrize("rank", [1, 5, 32])
def test_exclusive_parts_are_those_of_dense_twin_merging(family, rank):
    model, folders = family
    expected = dense_merge(model, folders, rank).exclusive
    _, parts = factored_merge(folders, rank)
    for expert, found in parts.items():
        assert set(found) == set(expected[expert]), "one that adapts less loses what the others share"
        for name, part in found.items():
            assert part.left.shape[1] == part.right.shape[0] <= min(rank, 4 + 3 + 5)
            torch.testing.assert_close(dense(part), dense(expected[expert][name]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [3, 32])
@torch.inference_mode()
def test_the_base_and_factored_parts_generate_what_each_dense_merge_generates(family, rank):
    model, folders = family
    before = state(model)
    models = []
    for route in WEIGHTS.tolist():
        models.append(copy.deepcopy(model))
        models[-1].load_state_dict(with_route(dense_merge(model, folders, rank), route))
    alone = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in prompts()]
    batch = left_padded(prompts())
    adapters = {name: read_factors(folder) for name, folder in folders.items()}
    merged = twin(before, adapters, rank / 32)
    assert merged.shared is before
    with attach(model, merged) as routes:
        routes.weights = WEIGHTS
        tokens, likelihoods = generated(model, batch), log_likelihoods(model, batch)
        routes.weights = torch.zeros_like(WEIGHTS)
        shared_only = generated(model, batch)
    expected = torch.cat([generated(dense, row) for dense, row in zip(models, alone, strict=True)])
    assert torch.equal(tokens, expected)
    for dense_model, row, found in zip(models, alone, likelihoods, strict=True):
        wanted = log_likelihoods(dense_model, row)[0]
        torch.testing.assert_close(found[-len(wanted) :], wanted, atol=1e-3, rtol=0)
    assert not torch.equal(tokens, shared_only), "the exclusive parts matter here"
    assert not torch.equal(shared_only, generated(model, batch)), "so does the shared difference"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


EMBEDDINGS = {
    "untied": (False, ["embed_tokens", "q_proj"], {}),
    "both": (False, ["embed_tokens", "lm_head"], {}),
    "tied": (True, ["embed_tokens", "q_proj"], {"ensure_weight_tying": True}),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
@torch.inference_mode()
def test_adapted_embeddings_are_merged_and_routed_as_factors(tmp_path, kind):
    """PEFT writes an adapted embedding's own weight too, and of a tied one the output's factors."""
    tie, targets, settings = EMBEDDINGS[kind]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SETTINGS | {"tie_word_embeddings": tie})).eval()
    base, folders, batch = state(model), {}, left_padded(prompts())
    for position, name in enumerate("abc"):
        folders[name] = tmp_path / name
        expert = adapted(model, {"r": 2 + position, "lora_alpha": 3, "target_modules": list(targets)} | settings).eval()
        expert.save_pretrained(folders[name])
        whole = copy.deepcopy(model)
        whole.load_state_dict(dict(read_adapter(folders[name], base)), strict=not tie)
        torch.testing.assert_close(whole(**batch).logits, expert(**batch).logits, atol=1e-4, rtol=0)
    adapters = {name: read_factors(folder, base) for name, folder in folders.items()}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in adapters["a"]} == {*targets}
    with attach(model, twin(base, adapters, 5 / 32)) as routes:
        routes.weights = WEIGHTS
        found = model(**batch).logits
    for row, route in enumerate(WEIGHTS.tolist()):
        whole = copy.deepcopy(model)
        whole.load_state_dict(with_route(dense_merge(model, folders, 5), route), strict=not tie)
        torch.testing.assert_close(found[row], whole(**batch).logits[row], atol=1e-4, rtol=0)


def test_an_embedding_of_a_tied_model_is_not_adapted_alone(tmp_path):
    """Of one layer, whose matrices have shapes of their own too; what tells a tied model is its embedding's."""
    model = LlamaForCausalLM(LlamaConfig(**SETTINGS | {"tie_word_embeddings": True, "num_hidden_layers": 1}))
    base = state(model)
    adapted(model, {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}).save_pretrained(tmp_path / "other")
    assert list(read_adapter(tmp_path / "other", base)) == list(base)
    for name, settings in {
        "factors": {"target_modules": ["embed_tokens"]},
        "whole": {"modules_to_save": ["embed_tokens"]},
    }.items():
        adapted(model, {"r": 2, "target_modules": ["q_proj"]} | settings).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=r"changes model\.embed_tokens\.weight and not the output"):
            read_adapter(tmp_path / name, base)
    both = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "target_modules": ["q_proj"]}
    expert = adapted(model, both)
    with torch.no_grad():
        expert.get_input_embeddings().weight.add_(1)
    expert.save_pretrained(tmp_path / "both")
    found = read_adapter(tmp_path / "both", base)
    assert list(found) == list(base)
    torch.testing.assert_close(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"] + 1)
    with pytest.raises(ValueError, match=r"in full model\.embed_tokens\.weight"):
        read_factors(tmp_path / "both", base)


@pytest.mark.parametrize(("d_out", "d_in", "columns"), [(12, 9, 4), (9, 12, 4), (12, 9, 30), (1, 9, 3)])
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_truncated_is_the_svd_of_the_product(d_out, d_in, columns, rank):
    part = factors(d_out, d_in, columns)
    u, s, vt = torch.linalg.svd(dense(part).double(), full_matrices=False)
    kept = min(rank, d_out, d_in, columns)
    found = truncated(part, rank)
    assert found.left.shape == (d_out, kept) and found.right.shape == (kept, d_in)
    torch.testing.assert_close(dense(found).double(), (u[:, :kept] * s[:kept]) @ vt[:kept], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.left.norm(dim=0), s[:kept].float())
    smaller = truncated(part, 1)
    torch.testing.assert_close(dense(LowRank(found.left[:, :1], found.right[:1])), dense(smaller))


def test_badly_balanced_factors_are_not_taken_for_noise():
    part = factors(rank=2)
    scales = torch.tensor([1e6, 1e-6])
    torch.testing.assert_close(
        dense(truncated(LowRank(part.left * scales, part.right / scales[:, None]), 2)), dense(part), atol=1e-5, rtol=0
    )


def test_what_cancels_is_nothing():
    part = factors()
    for zero in (
        LowRank(torch.cat([part.left, -part.left], 1), torch.cat([part.right, part.right])),
        LowRank(torch.zeros(12, 4), part.right),
        LowRank(torch.zeros(12, 0), torch.zeros(0, 9)),
    ):
        assert truncated(zero, 3).left.shape == (12, 0)
        assert truncated(zero, 3).right.shape == (0, 9)
    same = {t: {"w": part} for t in "abc"}
    assert exclusive(same, linear(same, equal(same, 1 / 3)), 0.5) == {"a": {}, "b": {}, "c": {}}, (
        "the average of equal experts"
    )
    torch.testing.assert_close(dense(linear(same, equal(same, 1 / 3))["w"]), dense(part))


def test_nothing_dense_is_formed():
    big = [factors(200_000, 200_000, 8, seed=seed) for seed in range(2)]  # 160 GB dense
    adapters = {t: {"w": part} for t, part in zip("ab", big, strict=True)}
    part = exclusive(adapters, linear(adapters, equal(adapters, 0.5)), 4 / 200_000)["a"]["w"]
    assert part.left.shape == (200_000, 4) and part.right.shape == (4, 200_000)
    whole = exclusive(adapters, linear(adapters, equal(adapters, 0.5)), 16 / 200_000)["a"]["w"]
    rows = torch.arange(0, 200_000, 20_011)
    expected = 0.5 * (big[0].left[rows] @ big[0].right[:, rows] - big[1].left[rows] @ big[1].right[:, rows])
    torch.testing.assert_close(whole.left[rows] @ whole.right[:, rows], expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(whole.left[:, :4] @ whole.right[:4, rows], part.left @ part.right[:, rows])


def slow_separate(adapters: dict, scale: float, scaling: float, rank: int, weights: list[float]) -> torch.Tensor:
    """The authors' formula on A and B without scale, which comes once, at the end."""

    def cut(matrix):
        u, s, vt = torch.linalg.svd(matrix)
        return sum(s[i] * torch.outer(u[:, i], vt[i]) for i in range(min(rank, len(s))))

    mixed = []
    for side in (0, 1):
        own = [pair[side] for pair in adapters.values()]
        shared = scaling * torch.stack(own).sum(0)
        mixed.append(shared + sum(w * cut(matrix - shared) for w, matrix in zip(weights, own, strict=True)))
    b, a = mixed
    return scale * b @ a


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_separate_dialect_is_the_authors_formula_and_another_merge(rank):
    scale, weights = 0.7, [0.2, 0.5, 0.3]
    pairs = {t: tuple(factors(seed=i)) for i, t in enumerate("abc")}
    adapters = {t: {"w": LowRank(scale * b, a)} for t, (b, a) in pairs.items()}
    found = dense(separate(adapters, SCALING, rank, weights)["w"])
    torch.testing.assert_close(found, slow_separate(pairs, scale, SCALING, rank, weights), atol=1e-4, rtol=0)
    shared = linear(adapters, equal(adapters, SCALING))
    parts = exclusive(adapters, shared, rank / 9)
    right = dense(shared["w"]) + sum(w * dense(parts[t]["w"]) for t, w in zip("abc", weights, strict=True))
    assert (found - right).norm() > 0.3 * right.norm()


def test_the_separate_dialect_depends_on_how_an_expert_is_written():
    turn = torch.linalg.qr(draw(4, 4, seed=9)).Q
    first, second = factors(seed=1), factors(seed=2)
    turned = LowRank(first.left @ turn, turn.T @ first.right)
    torch.testing.assert_close(dense(turned), dense(first))
    here, there = ({"a": {"w": part}, "b": {"w": second}} for part in (first, turned))
    torch.testing.assert_close(
        dense(linear(here, equal(here, 0.5))["w"]), dense(linear(there, equal(there, 0.5))["w"]), atol=1e-5, rtol=0
    )
    apart = [dense(separate(adapters, 0.5, 4, [0.5, 0.5])["w"]) for adapters in (here, there)]
    assert (apart[0] - apart[1]).norm() > 0.3 * apart[0].norm()


def test_coefficients_of_linear_methods_are_found_and_others_refused():
    tasks = ["a", "b", "c"]
    assert coefficients(scaled(0.3), tasks) == pytest.approx(dict.fromkeys(tasks, 0.3), abs=1e-5)
    assert coefficients(average.merge, tasks) == pytest.approx(dict.fromkeys(tasks, 1 / 3), abs=1e-5)
    assert coefficients(pretrained.merge, tasks) == dict.fromkeys(tasks, 0.0)
    one = coefficients(lambda b, e: one_expert.merge(b, e, task="b"), tasks)
    assert one == pytest.approx({"a": 0, "b": 1, "c": 0}, abs=1e-5)
    for method in (
        lambda b, e: ties.merge(b, e, density=0.2, scaling=1.0, scope="global", aggregate="mean"),
        lambda b, e: dare.merge(b, e, density=0.5, scaling=0.3, seed=0),
        lambda b, e: Merged(
            {n: average.merge(b, e).shared[n] if t.dim() < 2 else t.sort(0).values for n, t in b.items()}
        ),
    ):
        with pytest.raises(ValueError, match="this one is not: use suite"):
            coefficients(method, tasks)


def test_individual_experts_are_their_adapters():
    adapters = {t: {"w": factors(seed=seed)} for seed, t in enumerate("ab")}
    base = {"w": draw(12, 9)}
    for merged in (individual.factored(base, adapters), twin(base, adapters, 1.0, Merged(base))):
        assert merged.shared is base and merged.exclusive == adapters
        assert not merged.always, "nothing is factored anew"
    half = twin(base, adapters, 4 / 9, Merged(base)).exclusive["a"]["w"]
    assert half is not adapters["a"]["w"]
    torch.testing.assert_close(dense(half), dense(adapters["a"]["w"]), atol=1e-5, rtol=0)


def test_a_static_merge_is_each_adapters_share_beside_the_base():
    adapters, base = {t: {"w": factors(seed=seed)} for seed, t in enumerate("abc")}, {"w": draw(12, 9)}
    merged = static(average.merge, base, adapters)
    assert merged.shared is base and not merged.exclusive and len(merged.always) == 3
    for parts, adapter in zip(merged.always, adapters.values(), strict=True):
        torch.testing.assert_close(dense(parts["w"]), dense(adapter["w"]) / 3, atol=1e-4, rtol=0)
    assert not static(pretrained.merge, base, adapters).always
    (only,) = static(lambda b, e: one_expert.merge(b, e, task="b"), base, adapters).always
    torch.testing.assert_close(dense(only["w"]), dense(adapters["b"]["w"]), atol=1e-4, rtol=0)


def test_a_method_is_asked_for_its_own_factored_form():
    adapters, base = {t: {"w": factors(seed=seed)} for seed, t in enumerate("ab")}, {"w": draw(12, 9)}
    arithmetic = Method("shared", "task_arithmetic", scaled(SCALING))

    def form(base, adapters, shared):
        return twin(base, adapters, 1.0, shared)

    method = Method("twin", "twin_merging", None, route="router", shared=arithmetic, factored=form)
    found, expected = factored(method, base, adapters), twin(base, adapters, 1.0)
    assert len(found.always) == len(expected.always) == 2
    for task in adapters:
        assert torch.equal(dense(found.exclusive[task]["w"]), dense(expected.exclusive[task]["w"]))
    assert len(factored(arithmetic, base, adapters).always) == 2
    assert (
        factored(Method("own", "individual", None, factored=individual.factored), base, adapters).exclusive == adapters
    )


def test_a_method_without_a_factored_form_is_refused_by_name():
    method = Method("emr", "emr", None, route="task")
    with pytest.raises(ValueError, match=r"emr has no factored form, .* use suite\.factored=false"):
        factored(method, {}, {"a": {}})
    with pytest.raises(ValueError, match=r"this one is not: use suite\.factored=false"):
        factored(Method("t", "ties", lambda b, e: Merged({"w": b["w"] * 0})), {}, {"a": {}})


ONE = {"a": {"w": factors()}}
UNLIKE = ONE | {"b": {"w": factors(d_in=8)}}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: linear(ONE, {"a": float("nan")}), "coefficients must be finite"),
        (
            lambda: linear(ONE | {"b": {"w": factors(d_in=8)}}, {"a": 1.0, "b": 1.0}),
            r"w differs in shape: a \(12, 9\), b \(12, 8\)",
        ),
        (lambda: exclusive(ONE, {"w": factors(d_out=8)}, 0.5), r"the expert \(12, 9\), the shared difference \(8, 9\)"),
        (lambda: twin({}, ONE, 0.5, Merged({}), "magnitude"), "compression must be svd, got 'magnitude'"),
        (lambda: exclusive(ONE, {}, 0), r"rank_ratio must be in \(0, 1\], got 0"),
        (lambda: truncated(LowRank(draw(3, 2), draw(2, 3) / 0), 1), "NaN or infinite"),
        (lambda: separate(ONE, 1.0, 1, [1.0, 0.0]), "one for each of at least 1 adapter, got 2 for 1"),
        (lambda: separate({}, 1.0, 1, []), "at least 1 adapter, got 0 for 0"),
        (lambda: separate(ONE, float("inf"), 1, [1.0]), "scaling must be finite, got inf"),
        (lambda: separate(ONE, 0.5, 0, [1.0]), "rank must be at least 1, got 0"),
        (lambda: separate(ONE | {"b": {}}, 1.0, 1, [0.5, 0.5]), "missing: w of b"),
        (lambda: separate(ONE | {"b": {"w": factors(rank=2)}}, 1.0, 1, [0.5, 0.5]), "w differs in shape: a"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, r"in full lm_head\.weight"),
        ({"bias": "all"}, r"in full model\.layers\.0\.self_attn\.\w_proj\.bias, .* \(\+3 more\)"),
        ({"use_dora": True}, "use_dora=True"),
    ],
)
def test_adapters_that_change_more_than_low_rank_are_refused(tmp_path, settings, words):
    adapted(MODELS["qwen2"](), {"r": 2, "target_modules": ["q_proj"]} | settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        read_factors(tmp_path)


def test_adapters_that_fit_neither_their_configuration_nor_the_base_are_refused(tmp_path):
    model = MODELS["llama"]()
    adapted(model, ADAPTERS["fewer"]).save_pretrained(tmp_path)
    other = {name: torch.empty(3, 3, device="meta") for name in state(model)}
    with pytest.raises(ValueError, match=r"q_proj\.weight is \[3, 3\], A \[2, 32\] and B \[32, 2\] do not fit"):
        read_factors(tmp_path, other)
    with pytest.raises(ValueError, match=r"base, which lacks model\.layers"):
        read_factors(tmp_path, {})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 9}))
    with pytest.raises(ValueError, match=r"q_proj\.weight has A \[2, 32\] and B \[32, 2\], .* says rank 9"):
        read_factors(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        read_factors(tmp_path)
