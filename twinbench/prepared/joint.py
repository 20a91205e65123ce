"""``joint(split, rows, epochs, lr, size, seed)``: the base, trained on all tasks together under the experts' heads.

The rival that merging wants to spare: whoever has the rows can train one model on them. The heads stay those of the
experts, so that it is scored as every merge is. A batch is of one task, tasks take turns in proportion to their rows;
AdamW with a linear warm-up over 6 % of the steps and a linear decay; cross-entropy, or for a regression half the
squared error.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

READS = "training labels"
NEEDS = ("model", "encoded", "log_likelihoods")
WARMUP, DECAY = 0.06, 0.01


def prepare(bench) -> Callable[..., Mapping[str, Tensor]]:
    """The trained tensors that are merged, float32 on the CPU; once per workbench for the same arguments.

    Raises:
        ValueError: a task has no such split.
    """

    def joint(split: str, rows: int | None, epochs: int, lr: float, size: int, seed: int) -> Mapping[str, Tensor]:
        key = "prepared", "joint", split, rows, epochs, lr, size, seed
        return bench.remember(key, lambda: trained(bench, split, rows, epochs, lr, size, seed))

    return joint


def trained(bench, split: str, rows: int | None, epochs: int, lr: float, size: int, seed: int) -> dict[str, Tensor]:
    """Train, from the base."""
    suite, draw = bench.suite, torch.Generator().manual_seed(seed)
    counts = {task: len(suite.tasks[task].splits[split]) for task in suite.experts}
    counts = {task: there if rows is None else min(rows, there) for task, there in counts.items()}
    inputs = {task: suite.workload.encoded(suite.tokenizer, suite.tasks[task], split, n) for task, n in counts.items()}
    plan = [step for _ in range(epochs) for step in _epoch(counts, size, draw)]
    with (
        torch.random.fork_rng(),  # dropout's numbers
        bench.holding(suite.base) as module,
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        torch.manual_seed(seed)
        parameters = {name: parameter for name, parameter in module.named_parameters() if name in suite.base}
        optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=DECAY)
        rate = lambda step: min((step + 1) / max(1.0, WARMUP * len(plan)), (len(plan) - step) / len(plan))  # noqa: E731
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        models = {task: suite.workload.model(bench, task).train() for task in suite.experts}
        for task, chosen in tqdm(plan, desc="training on all tasks", unit="step", leave=False):
            loss = _loss(bench, models[task], inputs[task], task, split, chosen)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            schedule.step()
        module.eval()
        optimizer.zero_grad()
        return {name: parameter.detach().float().cpu().clone() for name, parameter in parameters.items()}


def _epoch(counts: Mapping[str, int], size: int, draw: torch.Generator) -> list[tuple[str, list[int]]]:
    """Batches of row numbers, each of one task, in random order."""
    batches = [
        (task, chosen.tolist())
        for task, count in counts.items()
        for chosen in torch.randperm(count, generator=draw).split(size)
    ]
    return [batches[at] for at in torch.randperm(len(batches), generator=draw).tolist()]


def _loss(bench, model, inputs: Mapping, task: str, split: str, chosen: list[int]) -> Tensor:
    """The mean loss of a batch."""
    spec = bench.suite.tasks[task]
    batch = bench.suite.tokenizer.pad(
        {key: [column[row] for row in chosen] for key, column in inputs.items()}, return_tensors="pt"
    ).to(bench.device)
    labels = torch.as_tensor(spec.labels(split)[chosen], device=bench.device)
    _, values = bench.suite.workload.log_likelihoods(model, batch, spec)
    if spec.classes is None:
        return 0.5 * (values[:, 0] - labels.float()).square().mean()
    return -values.gather(1, labels.long()[:, None]).mean()
