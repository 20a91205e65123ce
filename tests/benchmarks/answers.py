"""Answers of a causal language model: lm-eval's own passes against twinbench's, at SmolLM2-135M's size.

    PYTHONPATH=.:tests .venv/bin/python tests/benchmarks/answers.py [--precision bfloat16|float32] [--device cpu|cuda]

Random weights and tokens. Both ask the same live module, in turns; ratios are of their median seconds. Writes
results/benchmarks/answers.md and .json, answers_DEVICE_PRECISION.* for other than bfloat16 on the CPU.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from support.language import byte_tokenizer
from twinbench.merging.merged import Merged
from twinbench.records.provenance import versions
from twinbench.system.device import machine
from twinbench.system.memory import keep_freed
from twinbench.workbench import Workbench
from twinbench.workloads.generation.served import Served

RESULTS = Path(__file__).parents[2] / "results" / "benchmarks"
SIZE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SIZE |= {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True}
BATCH = 16
LETTERS = "letters: 32 prompts of 800 tokens, of which four prompts share 700; four options of two tokens"
SENTENCES = "sentences: 32 prompts of 60 tokens, eight options of twelve"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    asked = parser.parse_args()
    keep_freed()
    torch.manual_seed(0)
    write(measured(asked.device, asked.precision, asked.repetitions), asked)


def measured(device: str, precision: str, repetitions: int) -> list[dict]:
    """Per kind of answer: seconds of both (medians), their ratio, the largest difference of a log-likelihood."""
    model = LlamaForCausalLM(LlamaConfig(**SIZE)).eval().to(device)
    workload = SimpleNamespace(module=lambda suite, device: model)
    suite = SimpleNamespace(tokenizer=byte_tokenizer(), factored=False, workload=workload)
    bench = Workbench(suite, device, BATCH, 0, precision)
    served, state = Served(bench, 2048), {}
    contexts = [shots + tokens(100) for shots in map(tokens, [700] * 8) for _ in range(4)]
    letters = requests((context, [[11, 12 + letter] for letter in range(4)]) for context in contexts)
    sentences = requests((tokens(60), [tokens(12) for _ in range(8)]) for _ in range(32))

    def theirs(asked: list) -> list:
        with bench.holding(None):
            return HFLM._loglikelihood_tokens(served, asked, disable_tqdm=True)

    def ours(asked: list) -> list:
        with served.serving(Merged(state), None, 0.0), bench.answering(None):
            return served._loglikelihood_tokens(asked)

    kinds = {
        LETTERS: (lambda: theirs(letters), lambda: ours(letters)),
        SENTENCES: (lambda: theirs(sentences), lambda: ours(sentences)),
    }
    rows = []
    for kind, ways in kinds.items():
        seconds, found = ([], []), [None, None]
        for repetition in tqdm(range(repetitions + 1), desc=kind.partition(":")[0], unit="round"):
            for at, run in enumerate(ways):
                start = time.perf_counter()
                found[at] = run()
                if repetition:  # the first round warms up
                    seconds[at].append(time.perf_counter() - start)
        took = [statistics.median(each) for each in seconds]
        row = {"kind": kind, "lm_eval": took[0], "twinbench": took[1], "ratio": took[0] / took[1]}
        rows.append(row | {"difference": apart(*found), "all_seconds": seconds})
    return rows


def tokens(count: int) -> list[int]:
    return torch.randint(20, 49152, (count,)).tolist()


def requests(questions: Iterable[tuple[list[int], list[list[int]]]]) -> list[tuple]:
    """Requests as ``HFLM._loglikelihood_tokens`` takes them."""
    return [((str(context), str(option)), context, option) for context, options in questions for option in options]


def apart(one: list[tuple[float, bool]], other: list[tuple[float, bool]]) -> float:
    """The largest difference of two log-likelihoods."""
    return max(abs(a[0] - b[0]) for a, b in zip(one, other, strict=True))


def write(rows: list[dict], asked: argparse.Namespace) -> None:
    suffix = "" if (asked.device, asked.precision) == ("cpu", "bfloat16") else f"_{asked.device}_{asked.precision}"
    told, threads, date = versions(), torch.get_num_threads(), f"{datetime.now(UTC):%Y-%m-%d}"
    where = f"{machine()}, torch {told['torch']}, transformers {told['transformers']}"
    lines = [
        "# Answers of a causal language model\n",
        f"{where}, {threads} threads, {asked.precision}, {date}.\n",
        f"SmolLM2-135M's size (random weights), batches of {BATCH}; medians of {asked.repetitions} interleaved",
        "repetitions. lm-eval: the passes of its `HFLM` over the same module. Differences are of log-likelihoods.\n",
        "| answers | lm-eval, s | twinbench, s | times as fast | largest difference |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [f"{row[name]:.2f}" for name in ("lm_eval", "twinbench")] + [f"{row['ratio']:.1f}"]
        lines.append(f"| {row['kind']} | {' | '.join(cells)} | {row['difference']:.1e} |")
    table = "\n".join(lines) + "\n"
    (RESULTS / f"answers{suffix}.md").write_text(table, encoding="utf-8")
    found = {"machine": where, "threads": threads, "date": date, "versions": told, "rows": rows}
    (RESULTS / f"answers{suffix}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
