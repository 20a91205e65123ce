"""Routed inference against the static model and against a dense merge per sample, at RoBERTa-base size.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/routed.py [--device cpu|cuda] [--dtype float32|bfloat16]

Writes results/benchmarks/routed.md and .json, routed_DEVICE_DTYPE.* for other than float32 on the CPU. All ways of
running the batch take turns in one run; ratios are of their median seconds.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm
from transformers import RobertaConfig, RobertaForSequenceClassification

from twinbench.merging.merged import Merged, with_route
from twinbench.records.provenance import versions
from twinbench.routing.attach import attach
from twinbench.system.device import machine
from twinbench.weights.parts import LowRank, Part, dense

RESULTS = Path(__file__).parents[2] / "results" / "benchmarks"
EXPERTS, RANK, BATCH, TOKENS = 8, 76, 16, 48
TOLERANCE = 1e-3
REBUILT = 2  # samples of the batch that the dense merge really does; its time is scaled up to all of them
STATIC = "static model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repetitions", type=int, default=7)
    asked = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = measured(asked.device, getattr(torch, asked.dtype), asked.repetitions)
    write(rows, asked.device, asked.dtype, asked.repetitions)


def measured(device: str, dtype: torch.dtype, repetitions: int) -> list[dict]:
    """Per way of running the batch: seconds (median), ratio to the static model, largest difference of logits."""
    static = random_model().to(device, dtype)
    exclusive = random_parts(static.roberta)
    weights = {"near": near_one_hot(), "spread": (2 * torch.randn(BATCH, EXPERTS)).softmax(1)}
    weights["one"] = weights["spread"][:1].expand(BATCH, -1)
    ids = torch.randint(3, 50265, (BATCH, TOKENS), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    by_expert = weights["near"].argmax(1).argsort()
    with ExitStack() as stack:
        exact, adaptive = (copy.deepcopy(static) for _ in range(2))
        exact_routes = stack.enter_context(attach(exact.roberta, Merged({}, exclusive)))
        adaptive_routes = stack.enter_context(attach(adaptive.roberta, Merged({}, exclusive), TOLERANCE))

        def routed(model, routes, name: str, order: Tensor) -> Tensor:
            routes.weights = weights[name][order]
            return model(**{key: value[order.to(device)] for key, value in batch.items()}).logits

        def reference(name: str, order: Tensor) -> Tensor:
            return routed(exact, exact_routes, name, order)

        given = torch.arange(BATCH)
        whole = dense_parts(static.roberta, exclusive)
        one = copy.deepcopy(static)
        one.roberta.load_state_dict(with_route(whole, weights["one"][0].tolist()))
        ways = {  # name: how it runs, the exact logits for it, by how much its time is scaled
            STATIC: (lambda: static(**batch).logits, None, 1),
            "exact": (lambda: reference("near", given), None, 1),
            "adaptive, near-one-hot, as it comes": (
                lambda: routed(adaptive, adaptive_routes, "near", given),
                reference("near", given),
                1,
            ),
            "adaptive, near-one-hot, sorted by expert": (
                lambda: routed(adaptive, adaptive_routes, "near", by_expert),
                reference("near", by_expert),
                1,
            ),
            "adaptive, spread": (
                lambda: routed(adaptive, adaptive_routes, "spread", given),
                reference("spread", given),
                1,
            ),
            "one route for all, merged before": (lambda: one(**batch).logits, reference("one", given), 1),
            "dense merge per sample": (
                lambda: rebuilt(static, whole, weights["near"][:REBUILT], batch),
                reference("near", given)[:REBUILT],
                BATCH / REBUILT,
            ),
        }
        seconds, logits = timed({name: run for name, (run, _, _) in ways.items()}, repetitions, device)
    base = statistics.median(seconds[STATIC])
    rows = []
    for name, (_, expected, scale) in ways.items():
        took = scale * statistics.median(seconds[name])
        difference = None if expected is None else (logits[name] - expected).abs().max().item()
        row = {"way": name, "seconds": took, "ratio": took / base, "difference": difference}
        rows.append(row | {"all_seconds": [scale * s for s in seconds[name]]})
    effect = (logits["exact"] - logits[STATIC]).abs().max().item()
    return [*rows, {"way": "(largest effect of the exclusive parts on a logit)", "difference": effect}]


def timed(
    ways: dict[str, Callable[[], Tensor]], repetitions: int, device: str
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of every repetition, all ways taking turns after one round of warming up, and the last results."""
    seconds, results = {name: [] for name in ways}, {}
    for repetition in tqdm(range(repetitions + 1), desc="benchmark", unit="round"):
        for name, run in ways.items():
            wait(device)
            start = time.perf_counter()
            results[name] = run()
            wait(device)
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds, results


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rebuilt(model: nn.Module, whole: Merged, weights: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The official code's loop: for each sample sum all dense weights, and run it alone."""
    logits = []
    for row, route in enumerate(weights.tolist()):
        state = {f"roberta.{name}": tensor for name, tensor in with_route(whole, route).items()}
        inputs = {key: value[row : row + 1] for key, value in batch.items()}
        logits.append(functional_call(model, state, kwargs=inputs).logits)
    return torch.cat(logits)


def random_model() -> nn.Module:
    """A sequence classifier of RoBERTa-base's size."""
    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 3}
    return RobertaForSequenceClassification(RobertaConfig(**sizes)).eval()


def random_parts(backbone: nn.Module) -> dict[str, dict[str, Part]]:
    """For every expert a part of every parameter: matrices of low rank, vectors dense."""

    def part(parameter: Tensor) -> Part:
        if parameter.dim() == 1:
            return 0.02 * torch.randn(parameter.shape)
        rank = min(RANK, *parameter.shape)
        return LowRank(0.02 * torch.randn(parameter.shape[0], rank), 0.02 * torch.randn(rank, parameter.shape[1]))

    return {str(t): {name: part(p) for name, p in backbone.named_parameters()} for t in range(EXPERTS)}


def dense_parts(backbone: nn.Module, exclusive: dict[str, dict[str, Part]]) -> Merged:
    """The same model with its exclusive parts as full matrices, which is how the official code keeps them."""
    shared = {name: parameter.detach() for name, parameter in backbone.named_parameters()}
    like = next(iter(shared.values()))
    return Merged(shared, {t: {n: dense(p).to(like) for n, p in parts.items()} for t, parts in exclusive.items()})


def near_one_hot() -> Tensor:
    """Routes of a router that is sure: every expert twice, in random order, all other weights below 5e-4."""
    top = (torch.arange(BATCH) % EXPERTS)[torch.randperm(BATCH), None]
    rest = (5e-4 * torch.rand(BATCH, EXPERTS)).scatter_(1, top, 0.0)
    return rest.scatter_(1, top, 1 - rest.sum(1, keepdim=True))


def write(rows: list[dict], device: str, dtype: str, repetitions: int) -> None:
    """Print the table, and keep it with all that it depends on."""
    where = torch.cuda.get_device_name() if device == "cuda" else machine()
    date = datetime.now(UTC).date().isoformat()
    lines = [
        "# Routed inference\n",
        f"{where}, torch {versions()['torch']}, {torch.get_num_threads()} threads, {dtype}, {date}.\n",
        f"RoBERTa-base size (random weights), {EXPERTS} experts of rank {RANK}, a batch of {BATCH} x {TOKENS} tokens,",
        f"every sample its own route; medians of {repetitions} interleaved repetitions. Adaptive drops weights up to",
        f"{TOLERANCE}. The dense merge per sample is timed on {REBUILT} samples and scaled to {BATCH}. Differences of",
        "logits are to the exact mode.\n",
        "| way | seconds | x static | largest difference of a logit |\n| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        time_, ratio = (f"{row['seconds']:.4f}", f"{row['ratio']:.2f}") if "seconds" in row else ("", "")
        difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
        lines.append(f"| {row['way']} | {time_} | {ratio} | {difference} |")
    table = "\n".join(lines) + "\n"
    print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = "routed" if device == "cpu" and dtype == "float32" else f"routed_{device}_{dtype}"
    (RESULTS / f"{stem}.md").write_text(table)
    settings = {"experts": EXPERTS, "rank": RANK, "batch": BATCH, "tokens": TOKENS, "tolerance": TOLERANCE}
    found = {"machine": where, "date": date, "device": device, "dtype": dtype, "threads": torch.get_num_threads()}
    found |= {"versions": versions(), "settings": settings, "rows": rows}
    (RESULTS / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
