"""Log-likelihoods of answers under a causal language model, with as few passes and as few logits as they take.

The options of a question share a pass over its prompt and over what they begin with. Prompts of a batch share one over
their few-shot examples. Logits are formed where an answer is.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

Tokens = tuple[int, ...]
Score = tuple[float, bool]  # a log-likelihood, and whether the tokens are what greedy decoding writes
Past = tuple[Cache, Tensor]  # keys and values, and the mask (rows, tokens) of what they are of
SHARED = 64  # tokens that are worth a pass of their own


@torch.no_grad()
def scored(
    model: nn.Module,
    contexts: list[Tokens],
    shots: list[int],
    options: list[list[Tokens]],
    follow: Callable[[Sequence[int]], None],
) -> list[list[Score]]:
    """Score each context's options: a pass over all that they begin with, and one over what is left of them.

    lm-eval moves the white space at a prompt's end to the options, so they begin alike also where they are letters.

    Args:
        contexts: of each row the tokens before its options.
        shots: how many tokens a context begins with that others begin with, too (`shared`). Where all contexts have
            such, each beginning is read once.
        follow: is told of which context each row of the next pass is, but for the pass over what contexts share.
    """
    past, begun = None, [beginning(found) for found in options]
    if all(shots):
        shown = [context[:length] for context, length in zip(contexts, shots, strict=True)]
        distinct = list(dict.fromkeys(shown))
        _, past = _read(model, distinct, keep=1, cached=True)
        past = _repeated(past, [distinct.index(tokens) for tokens in shown])
        contexts = [context[length:] for context, length in zip(contexts, shots, strict=True)]
    owners = [row for row, found in enumerate(options) for _ in found]
    rests = [option[len(begin) :] for begin, found in zip(begun, options, strict=True) for option in found]
    longer = [at for at, rest in enumerate(rests) if len(rest) > 1]
    asked = [context + begin for context, begin in zip(contexts, begun, strict=True)]
    follow(range(len(asked)))
    cached = bool(longer) or past is not None
    logits, past = _read(model, asked, past, keep=1 + max(map(len, begun)), cached=cached)
    firsts = [_told(of[-1 - len(begin) : len(of) - 1], begin) for of, begin in zip(logits, begun, strict=True)]
    found = [_and(firsts[row], _told(logits[row, -1:], rest[:1])) for row, rest in zip(owners, rests, strict=True)]
    if longer:
        of = [owners[at] for at in longer]
        follow(of)
        left = [rests[at][:-1] for at in longer]
        logits, _ = _read(model, left, _repeated(past, of), keep=0, cached=True, pad_left=False)
        for at, row in zip(longer, logits, strict=True):
            found[at] = _and(found[at], _told(row[: len(rests[at]) - 1], rests[at][1:]))
    each = iter(found)
    return [[next(each) for _ in of] for of in options]


def rows(options: list[Tokens]) -> int:
    """How many rows a context takes in the widest pass of `scored`."""
    common = len(beginning(options))
    return max(1, sum(len(option) > common + 1 for option in options))


def shared(contexts: Iterable[Tokens]) -> dict[Tokens, int]:
    """How many tokens each context begins with that other ones begin with, too, such as few-shot examples.

    Contexts that begin like no others with SHARED tokens or more are left out; a token of each is never shared.
    """
    groups: list[list[Tokens]] = []
    for context in sorted(contexts):
        if groups and len(beginning([groups[-1][0], context])) >= SHARED:
            groups[-1].append(context)
        else:
            groups.append([context])
    return {context: len(beginning(group)) for group in groups if len(group) > 1 for context in group}


def beginning(options: list[Tokens]) -> Tokens:
    """The tokens that all options begin with, the last token of each left out."""
    tokens = takewhile(lambda column: len(set(column)) == 1, zip(*(option[:-1] for option in options), strict=False))
    return tuple(column[0] for column in tokens)


def _read(
    model: nn.Module,
    tokens: list[Tokens],
    past: Past | None = None,
    *,
    keep: int,
    cached: bool,
    pad_left: bool = True,
) -> tuple[Tensor, Past]:
    """A pass over the tokens of each row, after those that an earlier pass has read.

    Args:
        keep: how many logits of a row's end to form; 0 is all.
    """
    ids, mask = _padded(tokens, left=pad_left, device=model.device)
    cache, seen = past or (None, mask[:, :0])
    whole = torch.cat([seen, mask], 1)
    out = model(
        input_ids=ids,
        attention_mask=whole,
        position_ids=_positions(whole)[:, seen.shape[1] :],
        past_key_values=cache,
        use_cache=cached,
        logits_to_keep=keep,
    )
    return out.logits.float(), (getattr(out, "past_key_values", None), whole)


def _repeated(past: Past, rows: list[int]) -> Past:
    """What an earlier pass has read, once for each row that goes on from it."""
    cache, seen = past
    at = torch.tensor(rows)  # on the CPU: layers may lie on several devices
    cache.batch_select_indices(at)
    return cache, seen[at]


def _told(logits: Tensor, tokens: Tokens) -> Score:
    """The log-likelihood of tokens by the logits (tokens, vocabulary) before each, and if each is the likeliest."""
    wanted = torch.tensor(tokens, dtype=torch.long, device=logits.device)
    found = logits.log_softmax(-1).gather(1, wanted[:, None])
    return float(found.sum()), bool((logits.argmax(-1) == wanted).all())


def _and(first: Score, then: Score) -> Score:
    return first[0] + then[0], first[1] and then[1]


def _padded(rows: Sequence[Sequence[int]], *, left: bool, device) -> tuple[Tensor, Tensor]:
    """Token ids (n, longest) and their mask, 0 where there is padding."""
    width = max(len(row) for row in rows)
    sides = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
    ids = torch.stack([F.pad(torch.tensor(row, dtype=torch.long), side) for row, side in zip(rows, sides, strict=True)])
    mask = torch.stack([F.pad(torch.ones(len(row), dtype=torch.long), s) for row, s in zip(rows, sides, strict=True)])
    return ids.to(device), mask.to(device)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)
