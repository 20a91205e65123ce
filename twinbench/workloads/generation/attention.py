"""Causal attention over texts of several lengths, one text at a time: on a CPU that is faster than one mask for all.

A batch of prompts has a mask for each, the longest length squared; a packed row has one, its whole length squared. Half
of that and more is hidden. Without a mask PyTorch's kernel leaves out what a token must not see.
"""

import itertools

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PER_PROMPT, PER_EXAMPLE = "per_prompt", "per_example"  # their names among the library's attention functions


def sees_all(model: nn.Module) -> bool:
    """Whether each layer sees all tokens before one, and none a window of the last tokens.

    Only then may prompts share what they begin with: a window would count the padding between that and the rest.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def attend_per_prompt(model: PreTrainedModel) -> None:
    """Let the model's attention be `per_prompt`, where that is the same: where no layer sees a window."""
    if _is_plain(model):
        AttentionInterface.register(PER_PROMPT, per_prompt)
        AttentionMaskInterface.register(PER_PROMPT, sdpa_mask)
        model.set_attn_implementation(PER_PROMPT)


def attend_per_example(model: PreTrainedModel) -> None:
    """Let the model's attention be `per_example`, where that is the same.

    It is not where a layer sees a window of the last tokens, since no mask is made then, nor where layers do not hand
    positions on to their attention.
    """
    if not _is_plain(model):
        return
    AttentionInterface.register(PER_EXAMPLE, per_example)
    model.set_attn_implementation(PER_EXAMPLE)
    two = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    try:
        with torch.no_grad():
            model(input_ids=two, position_ids=two)
    except TypeError:  # `per_example` was called without positions
        model.set_attn_implementation("sdpa")


def _is_plain(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation == "sdpa" and sees_all(model)


def per_prompt(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given
) -> tuple[Tensor, None]:
    """Causal attention within a batch of padded prompts, one prompt at a time.

    Where earlier tokens are cached or the mask is not causal, it is the library's, with the mask.

    Args:
        query, key, value: of (prompts, heads, tokens, size); keys and values may have fewer heads.
        mask: (prompts, 1, tokens, tokens), True where a token is seen; None without padding.

    Returns:
        (prompts, tokens, heads, size), zeros where there is padding on the left, and no weights.
    """
    if mask is None or mask.shape[-1] != query.shape[2]:
        return sdpa_attention_forward(module, query, key, value, mask, **given)
    starts = mask[:, 0].diagonal(dim1=1, dim2=2).int().argmax(-1)  # where no padding is any more
    whole = starts.equal(mask[:, 0, -1].int().argmax(-1))  # the last token sees its prompt from the start
    if not whole or bool(mask[:, 0, 0, 1:].any()):  # the first sees one after it
        return sdpa_attention_forward(module, query, key, value, mask, **given)
    found = value.new_zeros(*query.shape[:3], value.shape[3]).transpose(1, 2)
    for row, start in enumerate(starts.tolist()):
        own = (states[row : row + 1, :, start:] for states in (query, key, value))
        found[row, start:] = sdpa_attention_forward(module, *own, None, **given)[0][0]
    return found, None


def per_example(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, position_ids: Tensor, **given
) -> tuple[Tensor, None]:
    """Causal attention within each example of a packed row, one example at a time.

    Args:
        query, key, value: of (1, heads, tokens, size); keys and values may have fewer heads.
        mask: none is made for an attention of this name.
        position_ids: (1, tokens), 0 where an example begins.

    Returns:
        (1, tokens, heads, size), and no weights.
    """
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    lengths = [end - start for start, end in itertools.pairwise([*starts, position_ids.shape[1]])]
    examples = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *states, None, **given)[0] for states in examples], dim=1), None
