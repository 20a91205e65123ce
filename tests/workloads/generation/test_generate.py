"""Routed generation: the prompt's route holds for the whole sequence, as if each sample had its own dense merge."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from baselines import task_arithmetic
from support.language import NEW, generated, left_padded, log_likelihoods, prompts
from twinbench.merging import twin_merging
from twinbench.merging.compress import basis
from twinbench.merging.merged import Merged, materialize, with_route
from twinbench.routing.attach import attach

WEIGHTS = torch.tensor([[1, 0, 0], [0.2, 0.3, 0.5], [0, 0, 1], [0.05, 0.9, 0.05]])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(config).eval()


def merged_model(model: LlamaForCausalLM, rank_ratio: float) -> Merged:
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    experts = {
        t: {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        for t in "abc"
    }
    shared = dict(task_arithmetic.merge(base, experts, scaling=0.3).shared)
    settings = {"compression": "svd", "rank_ratio": rank_ratio, "density": None, "seed": 0, "basis": basis}
    return materialize(twin_merging.merge(base, experts, shared=shared, **settings))


def dense_models(model: LlamaForCausalLM, merged: Merged) -> list[LlamaForCausalLM]:
    models = []
    for route in WEIGHTS.tolist():
        models.append(copy.deepcopy(model))
        models[-1].load_state_dict(with_route(merged, route), strict=False)
        assert models[-1].lm_head.weight is models[-1].model.embed_tokens.weight
    return models


@pytest.mark.parametrize("rank_ratio", [1.0, 0.2])
@pytest.mark.parametrize("beams", [1, 3])
@torch.inference_mode()
def test_a_mixed_batch_generates_what_each_dense_merge_generates(model, rank_ratio, beams):
    merged, rows = merged_model(model, rank_ratio), prompts()
    model.load_state_dict(merged.shared, strict=False)
    with attach(model, merged) as routes:
        routes.weights = WEIGHTS
        got = generated(model, left_padded(rows), num_beams=beams)
    alone = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    models = dense_models(model, merged)
    expected = [generated(dense, row, num_beams=beams) for dense, row in zip(models, alone, strict=True)]
    assert torch.equal(got, torch.cat(expected))
    assert not torch.equal(got, generated(model, left_padded(rows), num_beams=beams)), "the exclusive parts matter here"


@pytest.mark.parametrize("rank_ratio", [1.0, 0.2])
@torch.inference_mode()
def test_log_likelihoods_are_those_of_the_dense_merges(model, rank_ratio):
    merged, rows = merged_model(model, rank_ratio), prompts()
    model.load_state_dict(merged.shared, strict=False)
    with attach(model, merged) as routes:
        routes.weights = WEIGHTS
        got = log_likelihoods(model, left_padded(rows))
    for row, dense, found in zip(rows, dense_models(model, merged), got, strict=True):
        expected = log_likelihoods(dense, {"input_ids": row, "attention_mask": torch.ones_like(row)})[0]
        torch.testing.assert_close(found[-len(expected) :], expected, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_a_part_of_the_tied_embedding_acts_in_the_head_too(model):
    merged, rows = merged_model(model, 1.0), prompts()
    only = {
        t: {"model.embed_tokens.weight": parts["model.embed_tokens.weight"]} for t, parts in merged.exclusive.items()
    }
    embedding = Merged(merged.shared, only)
    model.load_state_dict(merged.shared, strict=False)
    with attach(model, embedding) as routes:
        routes.weights = WEIGHTS
        got = model(**left_padded(rows)).logits[:, -1]
    for row, dense, found in zip(rows, dense_models(model, embedding), got, strict=True):
        torch.testing.assert_close(found, dense(row).logits[0, -1], atol=1e-3, rtol=0)


@torch.inference_mode()
def test_runs_under_autocast(model):
    merged, batch = merged_model(model, 0.2), left_padded(prompts())
    model.load_state_dict(merged.shared, strict=False)
    settings = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": NEW, "do_sample": False}
    with attach(model, merged) as routes:
        routes.weights = WEIGHTS
        exact = model(**batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            low = model(**batch).logits
            out = model.generate(**batch, **settings)
    assert out.sequences.shape[1] == batch["input_ids"].shape[1] + NEW
    assert all(torch.isfinite(logits).all() for logits in out.logits)
    seen = batch["attention_mask"].bool()
    assert (low - exact)[seen].abs().max() < 0.1 * exact[seen].abs().max()
