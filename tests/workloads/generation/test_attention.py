"""Attention text by text is that with a mask, and is taken only where it is."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PersimmonConfig

from twinbench.workloads.generation.attention import (
    PER_EXAMPLE,
    PER_PROMPT,
    attend_per_example,
    attend_per_prompt,
    per_prompt,
)

KINDS = [(MistralConfig, {"sliding_window": 8}), (PersimmonConfig, {}), (GPT2Config, {}), (LlamaConfig, {})]
LENGTHS = 9, 21, 40


def model_of(kind, more: dict):
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 32, "num_key_value_heads": 2, "pad_token_id": 0} | more
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**sizes | more)).eval()


@pytest.mark.parametrize(("kind", "more"), KINDS)
def test_examples_are_attended_to_one_by_one_only_where_that_is_the_same(kind, more):
    """Mistral sees a window of the last tokens; Persimmon hands no positions on; the others are as most."""
    model = model_of(kind, more | {"use_cache": False})
    ids = torch.randint(1, 50, (1, 40))
    given = {"input_ids": ids, "position_ids": torch.cat([torch.arange(15), torch.arange(25)])[None]}
    with torch.inference_mode():
        before = model(**given).logits
        attend_per_example(model)
        assert torch.allclose(model(**given).logits, before, atol=1e-5)
    assert (model.config._attn_implementation == PER_EXAMPLE) == (kind in (GPT2Config, LlamaConfig))


def padded(side: str) -> dict[str, torch.Tensor]:
    """Prompts of several lengths, padded on one side."""
    mask = torch.stack([torch.arange(max(LENGTHS)) < length for length in LENGTHS]).long()
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "more"), KINDS)
def test_prompts_are_attended_to_one_by_one_only_where_that_is_the_same(kind, more, side):
    """Each prompt's logits against those of the prompt alone; then tokens after it, from the cache."""
    model, given = model_of(kind, more), padded(side)
    attend_per_prompt(model)
    assert (model.config._attn_implementation == PER_PROMPT) == (kind is not MistralConfig)
    further = torch.randint(1, 50, (len(LENGTHS), 3), generator=torch.Generator().manual_seed(2))
    mask = torch.cat([given["attention_mask"], torch.ones_like(further)], 1)
    places = (mask.cumsum(1) - 1)[:, -3:]
    with torch.inference_mode():
        first = model(**given, use_cache=True)
        after = {"attention_mask": mask, "position_ids": places, "past_key_values": first.past_key_values}
        then = model(input_ids=further, **after).logits
        for row, length in enumerate(LENGTHS):
            real = given["attention_mask"][row].bool()
            ids = torch.cat([given["input_ids"][row, real], further[row]])[None]
            alone = model(ids).logits[0]
            assert torch.allclose(first.logits[row, real], alone[:length], atol=1e-5)
            if model.config._attn_implementation == PER_PROMPT:  # a window would count the padding in between
                assert torch.allclose(then[row], alone[length:], atol=1e-5)


def test_a_batch_of_prompts_is_answered_token_for_token_as_with_a_mask():
    model, given = model_of(LlamaConfig, {}), padded("left")
    ids, mask = given["input_ids"], given["attention_mask"]
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    attend_per_prompt(model)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False).equal(wanted)
    assert model.config._attn_implementation == PER_PROMPT


def masks() -> dict[str, torch.Tensor]:
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    packed = torch.block_diag(causal[:2, :2], causal[:4, :4]).bool()
    unfilled = torch.cat([causal, torch.zeros(6, 3, dtype=torch.bool)], 1)
    return {"later": torch.ones_like(causal), "packed": packed, "unfilled": unfilled, "one": unfilled[:1]}


@pytest.mark.parametrize("kind", masks())
def test_another_mask_than_that_of_padded_prompts_is_kept(kind):
    """A token sees later ones; two examples in a row; a cache with room for more; the first token with such a cache."""
    mask = masks()[kind].expand(2, 1, -1, -1)
    rows, columns = mask.shape[2:]
    query, key, value = torch.randn(2, 4, rows, 8), *torch.randn(2, 2, 4, columns, 8).unbind()
    found, _ = per_prompt(torch.nn.Module(), query, key, value, mask)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    assert torch.allclose(found, plain, atol=1e-6)
