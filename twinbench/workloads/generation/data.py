"""Generative tasks: lm-eval's own tasks, their prompts as the rows of a `Task`, and what they make of the answers.

A prompt is rendered once, few-shot examples and chat template included, by lm-eval itself; the router reads it, the
experts are trained on it, and lm-eval asks it again when it scores.
"""

import copy
import logging
import time
import warnings
from collections.abc import Mapping
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from twinbench.merging.factored import with_shared
from twinbench.merging.method import Method, merge
from twinbench.routing import learned
from twinbench.routing.learned import Setting
from twinbench.suite import Suite, backbone, load
from twinbench.system import processes
from twinbench.system.mistakes import Mistake
from twinbench.workloads.classification.data import SPLIT_SEED, Task

TASKS = Path(__file__).parents[2] / "tasks" / "lm_eval"  # YAML files of our own
MULTITURN = True  # few-shot examples as turns of a chat, where a task has any: lm-eval's default


def load_task(
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, Path],
    *,
    name: str,
    lm_eval: str,
    metrics: list[str],
    max_length: int,
    rows: Mapping[str, int | None],
    limit: int | None = None,
) -> Task:
    """Open an lm-eval task and render its prompts.

    Args:
        tokenizer: of the base; where it has a chat template, prompts are in it.
        sources: ``folder``, which our own tasks read; lm-eval's built-in ones know where their data is.
        lm_eval: the task: one of ours, any that lm-eval knows by name, or a task YAML file.
        metrics: of lm-eval's for this task, the primary one first.
        max_length: tokens of a prompt with its answer; of longer prompts the beginning is left out.
        rows: of train, validation (held out of the training documents where the task has no such split, or scores it)
            and test; drawn by a seed where there are more; None is all.
        limit: at most so many rows of the test.

    Raises:
        ValueError: lm-eval has no such task, it has no documents to train on, or a metric is not among its own.
    """
    opened = _opened(lm_eval, {key: str(path) for key, path in sources.items()})
    known = list(opened.aggregation())
    absent = [metric for metric in metrics if metric not in known]
    if absent or not metrics:
        raise Mistake(f"task {name}: lm-eval's {lm_eval} has the metrics {', '.join(known)}; got {list(metrics)}")
    whole = _documents(opened, name, rows)
    docs = {split: _drawn(found, rows[split], f"task {name}: {split}") for split, found in whole.items()}
    if limit is not None:
        docs["test"] = docs["test"].select(range(min(limit, len(docs["test"]))))
    subsets = {
        split: f"{len(found)} of {len(whole[split])} documents{f', drawn by seed {SPLIT_SEED}' if rows[split] else ''}"
        for split, found in docs.items()
        if len(found) < len(whole[split])
    }
    harness = {split: _scoring(opened, found) for split, found in docs.items()}
    with _quiet():
        frames = {split: pd.DataFrame({"prompt": prompts(scored, tokenizer)}) for split, scored in harness.items()}
    return Task(name, ("prompt",), None, tuple(metrics), max_length, frames, harness=harness, subsets=subsets)


def measure(
    suite: Suite, method: Method, route: str | None, setting: Setting, task: str, split: str
) -> tuple[dict[str, float], pd.DataFrame, float, dict]:
    """Let lm-eval score a split of a task.

    Args:
        route: as `learned.applied` takes it.

    Returns:
        The task's metrics, the primary one first, and that one by subject where documents have one; per document its
        row, its primary score as ``prediction`` (a label it has none), lm-eval's hash of its prompt and what was
        answered; the seconds that it took; and for the records ``warnings``, the ``harness``, lm-eval's version and
        the task's, and the ``subset`` of the documents, None for all.
    """
    spec = suite.tasks[task]
    results, seconds, said = _evaluated(suite, method, route, setting, task, split)
    (found,), (samples,) = results["results"].values(), results["samples"].values()
    named = [key.partition(",")[::2] for key in found]  # METRIC,FILTER: some tasks read an answer in several ways
    reading = next(filtered for metric, filtered in named if metric == spec.metrics[0])
    values = {metric: float(found[f"{metric},{reading}"]) for metric in spec.metrics}
    samples = sorted((s for s in samples if s["filter"] == reading), key=lambda sample: sample["doc_id"])
    frame = pd.DataFrame(
        {
            "row": range(len(samples)),
            "label": np.nan,
            "prediction": [float(sample[spec.metrics[0]]) for sample in samples],
            "prompt_hash": [sample["prompt_hash"] for sample in samples],
            "answer": [str(sample["filtered_resps"]) for sample in samples],
        }
    )
    if "subject" in samples[0]["doc"]:  # MMLU's
        subjects = frame.groupby([sample["doc"]["subject"] for sample in samples])["prediction"].mean()
        values |= {f"{spec.metrics[0]}/{subject}": float(value) for subject, value in subjects.items()}
    by = f"lm-eval {version('lm_eval')}, {spec.harness[split].config.task} {spec.harness[split].VERSION}"
    return values, frame, seconds, {"warnings": said, "harness": by, "subset": spec.subsets.get(split)}


@lru_cache(maxsize=128)
def _evaluated(
    suite: Suite, method: Method, route: str | None, setting: Setting, task: str, split: str
) -> tuple[dict, float, list[str]]:
    """What lm-eval says of a split of a task under the merged model, the seconds that it took, and warnings."""
    from lm_eval.evaluator import evaluate

    merged, spec = merge(suite, method, setting.gold_biases)[0], suite.tasks[task]
    weights = learned.applied(suite, method, route, setting, task, split)
    if suite.factored:
        weights = torch.zeros(len(spec.splits[split]), 0) if weights is None else weights
        weights = with_shared(weights, len(suite.experts))
    model = _served(suite, setting.device, setting.batch_size)
    model._max_length = spec.max_length
    tolerance = setting.router.tolerance if setting.router else 0.0
    start = time.perf_counter()
    with _quiet(), model.serving(merged, weights, tolerance):
        results = evaluate(
            model,
            {"tasks": {task: spec.harness[split]}, "groups": {}, "group_map": {}},
            bootstrap_iters=0,
            apply_chat_template=suite.tokenizer.chat_template is not None,
            fewshot_as_multiturn=MULTITURN,
        )
        said = processes.gathered(model.warnings)
        return results, time.perf_counter() - start, list(dict.fromkeys(said))


@lru_cache(maxsize=1)
def _served(suite: Suite, device: str, batch_size: int):
    from twinbench.workloads.generation.served import Served  # lm-eval's models take seconds to import

    module = backbone(suite, device)
    with _quiet():
        put = None if suite.factored else partial(load, module)
        return Served(module, suite.tokenizer, put, batch_size, max_length=1)


def prompts(scored, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompt of every document, as lm-eval asks it."""
    template = chat_template(tokenizer)
    scored.build_all_requests(
        apply_chat_template=template is not None, fewshot_as_multiturn=MULTITURN, chat_template=template
    )
    first = {request.doc_id: request.args[0] for request in reversed(scored.instances)}
    return [first[number] for number in range(len(first))]


def answers(scored) -> list[str]:
    """The right answer to every document's prompt, as the model should write it."""
    found = []
    for doc in scored.eval_docs:
        target = scored.doc_to_target(doc)
        if scored.OUTPUT_TYPE == "multiple_choice":
            choices = scored.doc_to_choice(doc)
            target = choices[int(target)] if not isinstance(target, str) or target.isdigit() else target
        found.append(target if isinstance(target, str) else target[0])
    return found


def chat_template(tokenizer: PreTrainedTokenizerBase):
    """How a conversation is written for the base, or None where it has no template of its own."""
    if not tokenizer.chat_template:
        return None

    def written(turns: list[dict], add_generation_prompt: bool = True) -> str:
        return tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    return written


@lru_cache(maxsize=1)
def _everything():
    """lm-eval's own tasks; thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _opened(task: str, metadata: Mapping[str, str]):
    """The lm-eval task with its documents."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        ours = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=dict(metadata))
        if task.endswith(".yaml"):
            (opened,) = ours.load(task)["tasks"].values()
            return opened
        manager = ours if task in ours.all_tasks else _everything()
        if task not in manager.all_subtasks:
            near = [known for known in manager.all_subtasks if task.lower() in known.lower()][:5]
            raise Mistake(
                f"lm-eval has no task {task!r} (groups of tasks are listed one by one)"
                f"{'; it has ' + ', '.join(near) if near else ''}; ours are {', '.join(ours.all_tasks)}"
            )
        return manager.load(task)["tasks"][task]


def _documents(opened, name: str, rows: Mapping[str, int | None]) -> dict:
    """Train, validation and test documents that have none in common."""
    test = opened.eval_docs
    train = opened.training_docs() if opened.has_training_docs() else None
    if train is None:
        raise Mistake(f"task {name}: lm-eval's task has no training split, so neither expert nor router can learn it")
    validation = opened.validation_docs() if opened.has_validation_docs() and opened.has_test_docs() else None
    if validation is None:
        order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
        held_out = rows["validation"] or max(1, len(train) // 10)
        validation, train = (train.select(sorted(part)) for part in (order[:held_out], order[held_out:]))
    return {"train": train, "validation": validation, "test": test}


def _drawn(docs, count: int | None, who: str):
    if count is not None and not 1 <= count <= len(docs):
        raise Mistake(f"{who}: rows must be in [1, {len(docs)}] or null, got {count}")
    if count is None or count == len(docs):
        return docs
    return docs.select(sorted(np.random.default_rng(SPLIT_SEED).choice(len(docs), count, replace=False)))


def _scoring(opened, docs):
    """The lm-eval task with these documents as its test."""
    scored, config = copy.copy(opened), copy.copy(opened.config)
    config.test_split, config.process_docs = "scored", None  # it has been applied to what is scored already
    scored._config, scored.dataset = config, dict(opened.dataset) | {"scored": docs}
    return scored


class _quiet:
    """lm-eval and rouge (absl) tell much that is no news here; datasets shows bars for files that take no time."""

    def __enter__(self):
        import datasets

        self.levels = {name: logging.getLogger(name).level for name in ("lm_eval", "absl")}
        for name in self.levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        self.bars = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error):
        import datasets

        self.caught.__exit__(*error)
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)
        if not self.bars:
            datasets.enable_progress_bars()
