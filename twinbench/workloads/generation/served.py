"""A merged or routed causal language model as lm-eval's ``HFLM``: a prompt is answered under its route's weights.

Log-likelihoods are `likelihood`'s, generation is ``HFLM``'s own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from twinbench.merging.merged import Merged, with_route
from twinbench.routing.attach import attach
from twinbench.routing.batch import Routes, merges_each
from twinbench.routing.layerwise import gated
from twinbench.system import processes
from twinbench.workbench import Workbench
from twinbench.workloads.generation import likelihood
from twinbench.workloads.generation.attention import sees_all
from twinbench.workloads.generation.likelihood import Score, Tokens


class Served(HFLM):
    """One live model for all configurations of a suite.

    Attributes:
        warnings: what happened to the prompts since `serving` began, in words.
    """

    def __init__(self, bench: Workbench, max_length: int):
        """Serve the bench's module.

        Args:
            max_length: tokens of a prompt with its answer; of longer prompts the beginning is left out.
        """
        given = {"tokenizer": bench.suite.tokenizer, "batch_size": bench.batch_size, "max_length": max_length}
        super().__init__(bench.module, backend="causal", **given)
        self._bench, self._merged, self._weights, self._tolerance = bench, None, None, 0.0
        self._routes: Routes | None = None
        self._route_of: dict[str, Tensor] = {}
        self.warnings: list[str] = []

    @contextmanager
    def serving(self, merged: Merged, weights: Tensor | None, tolerance: float) -> Iterator[None]:
        """Answer under a merged model while the context lasts.

        Args:
            weights: w(x), (documents, experts), or None for a model without exclusive parts.
            tolerance: as `twinbench.routing.attach.attach` takes it.
        """
        self._merged, self._weights, self._tolerance, self.warnings = merged, weights, tolerance, []
        try:
            yield
        finally:
            self._merged = self._weights = None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._in_shares(lambda mine: self._by_route(super(Served, self).loglikelihood, mine), requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._in_shares(self._generated, requests)

    def _generated(self, requests: list[Instance]) -> list[str]:
        order = sorted(range(len(requests)), key=lambda at: -len(requests[at].args[0]))
        found: list = [None] * len(requests)
        with tqdm(total=len(order), desc="generating", unit="prompt", leave=False) as bar:

            def ask(asked: list[Instance]) -> list[str]:
                return self._in_batches(asked, lambda part: super(Served, self).generate_until(part, True), bar)

            for at, answer in zip(order, self._by_route(ask, [requests[at] for at in order]), strict=True):
                found[at] = answer
        return found

    def _in_shares(self, ask: Callable[[list[Instance]], list], requests: list[Instance]) -> list:
        """Ask this process's share of the requests, whole questions, and hear of the other processes' answers."""
        mine = [at for at, request in enumerate(requests) if request.doc_id % processes.count() == processes.rank()]
        answers = ask([requests[at] for at in mine]) if mine else []
        found = dict(processes.gathered(list(zip(mine, answers, strict=True))))
        return [found[at] for at in range(len(requests))]

    def _by_route(self, ask: Callable[[list[Instance]], list], requests: list[Instance]) -> list:
        """Ask requests under the weights of their routes; a handful of routes are merged, others run side by side."""
        merged, factored = self._merged, self._bench.suite.factored
        shared = None if factored else merged.shared  # factors run beside the base, which the module holds and keeps
        if self._weights is None and not merged.always:
            with self._bench.answering(shared), gated(self.model, merged) if merged.gates else nullcontext():
                return ask(requests)
        weights = torch.zeros(len(requests), 0)
        if self._weights is not None:
            weights = self._weights[[request.doc_id for request in requests]]
        distinct, group = (weights, None) if factored else weights.unique(dim=0, return_inverse=True)
        if factored or not merges_each(len(distinct), *weights.shape):
            self._route_of = {request.args[0]: route for request, route in zip(requests, weights, strict=True)}
            with self._bench.answering(shared), attach(self.model, merged, self._tolerance) as self._routes:
                try:
                    return ask(requests)
                finally:
                    self._routes = None
        found: list = [None] * len(requests)
        for number, route in enumerate(distinct):
            rows = (group == number).nonzero().flatten().tolist()
            with self._bench.answering(with_route(merged, route.tolist())):
                answers = ask([requests[row] for row in rows])
            for row, answer in zip(rows, answers, strict=True):
                found[row] = answer
        return found

    def _in_batches(self, items: list, run: Callable[[list], list], bar: tqdm, rows: Callable = lambda _: 1) -> list:
        """Run items in batches; where a GPU's memory is too small for one, in smaller ones from then on.

        Args:
            rows: how many rows of a batch an item takes. One item is run, however many it takes.
        """
        size, found = int(self.batch_size), []
        while len(found) < len(items):
            ends = accumulate(rows(item) for item in items[len(found) : len(found) + size])
            part = items[len(found) : len(found) + max(1, sum(end <= size for end in ends))]
            try:
                found += run(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                torch.cuda.empty_cache()
                size //= 2
                self._warn(f"GPU out of memory: batches of {size}")
                continue
            bar.update(len(part))
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether each is what greedy decoding writes."""
        options: dict[Tokens, dict[Tokens, Score | None]] = {}
        texts = {}
        for (text, _), context, continuation in requests:
            options.setdefault(tuple(context), {})[tuple(continuation)] = None
            texts[tuple(context)] = text
        room = {context: max(1, self.max_length - max(map(len, found))) for context, found in options.items()}
        cut = sum(len(context) > room[context] for context in options)
        if cut:
            self._warn(f"{cut} prompts with answers longer than {self.max_length} tokens: their beginning is left out")
        read = {context: context[-room[context] :] for context in options}
        alone = self._routes is not None or not sees_all(self.model)  # other routes give other states
        shots = {} if alone else likelihood.shared(set(read.values()))

        def place(context: Tokens) -> tuple:  # those that begin alike side by side, then by length
            length = shots.get(read[context], 0)
            return -length, read[context][:length], -len(context), read[context]

        def run(part: list[Tokens]) -> list[None]:
            # Together, those that begin alike and those that do not would be read whole, padded to the longest.
            kinds = ([context for context in part if (read[context] in shots) == begins] for begins in (True, False))
            for own in filter(None, kinds):
                found = likelihood.scored(
                    self.model,
                    [read[context] for context in own],
                    [shots.get(read[context], 0) for context in own],
                    [list(options[context]) for context in own],
                    lambda owners, own=own: self._follow([texts[context] for context in own], owners),
                )
                for context, scores in zip(own, found, strict=True):
                    options[context] = dict(zip(options[context], scores, strict=True))
            return [None] * len(part)

        with tqdm(total=len(options), desc="log-likelihoods", unit="prompt", leave=False) as bar:
            self._in_batches(sorted(options, key=place), run, bar, lambda context: likelihood.rows([*options[context]]))
        return [options[tuple(context)][tuple(continuation)] for _, context, continuation in requests]

    def tok_batch_encode(self, strings: Sequence[str], *args, **kwargs) -> tuple[Tensor, Tensor]:
        """As ``HFLM``'s, which calls this for each batch right before it generates: these are the prompts of it."""
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        self._follow(list(strings), range(len(strings)))
        room = kwargs.get("left_truncate_len")
        cut = sum(len(self.tok_encode(text)) > room for text in strings) if room and ids.shape[1] >= room else 0
        if cut:
            self._warn(f"{cut} prompts longer than {room} tokens: their beginning is left out")
        return ids, mask

    def _follow(self, texts: list[str], owners: Sequence[int]) -> None:
        """Set the routes of the batch that comes next, where exclusive parts run beside the shared model."""
        if self._routes is not None:
            self._routes.weights = torch.stack([self._route_of[texts[owner]] for owner in owners])

    def _warn(self, what: str) -> None:
        if what not in self.warnings:
            self.warnings.append(what)
