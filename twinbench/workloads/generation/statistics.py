"""What Gram matrices need to know of a causal language model: its prompts as rows.

There is no ``log_likelihoods``: what a model may answer cannot be listed, so its Fisher information would be an
estimate from the right answers.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from twinbench.system.mistakes import Mistake
from twinbench.workloads.generation.data import encoded


def model(bench, task: str) -> nn.Module:
    """The bench's module; there are no heads."""
    return bench.module


def batches(bench, task: str, split: str, rows: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The first prompts of a split as padded inputs of the model, short ones first, on the bench's device.

    Of a prompt that is too long the beginning is left out.

    Raises:
        ValueError: the split has fewer rows.
    """
    spec, tokenizer = bench.suite.tasks[task], bench.suite.tokenizer
    prompts = spec.splits[split]["prompt"].tolist()
    if rows > len(prompts):
        raise Mistake(f"task {task}: rows must be in [1, {len(prompts)}], the rows of its {split} split; got {rows}")
    ids = sorted(encoded(tokenizer, spec, split, rows)["input_ids"], key=len)
    for start in range(0, rows, batch_size):
        batch = {"input_ids": ids[start : start + batch_size]}
        yield dict(tokenizer.pad(batch, padding_side="right", return_tensors="pt").to(bench.device))
