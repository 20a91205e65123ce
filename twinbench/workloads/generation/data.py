"""Generative tasks: lm-eval's own tasks, their prompts as the rows of a `Task`, and what they make of the answers.

A prompt is rendered once, few-shot examples and chat template included, by lm-eval itself; the router reads it, the
experts are trained on it, and lm-eval asks it again when it scores.
"""

import copy
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from twinbench.suite import CONTENT, SPLIT_SEED, Task
from twinbench.system.mistakes import Mistake

TASKS = Path(__file__).parents[2] / "tasks" / "lm_eval"  # YAML files of our own
MULTITURN = True  # few-shot examples as turns of a chat, where a task has any: lm-eval's default


@dataclass(frozen=True)
class Spec:
    """What a task file says beside where its documents are.

    Attributes:
        lm_eval: the task: one of ours, any that lm-eval knows by name, or a task YAML file.
        metrics: of lm-eval's for this task, the primary one first.
        max_length: tokens of a prompt with its answer; of longer prompts the beginning is left out.
        rows: of train, validation (held out of the training documents where the task has no such split, or scores it)
            and test; drawn by a seed where there are more; None is all.
    """

    lm_eval: str
    metrics: list[str]
    max_length: int
    rows: Mapping[str, int | None]


def read(
    name: str,
    config: Mapping,
    sources: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    split: str,
) -> Task:
    """Read a task of a resolved suite from its local sources."""
    spec = Spec(**{key: value for key, value in config.items() if key not in ("sources", "finetune")})
    return load_task(name, spec, sources, tokenizer, limit, split)


def load_task(
    name: str,
    spec: Spec,
    sources: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    split: str = "test",
) -> Task:
    """Open an lm-eval task and render its prompts.

    Args:
        sources: ``folder``, which our own tasks read; lm-eval's built-in ones know where their data is.
        tokenizer: of the base; where it has a chat template, prompts are in it.
        limit: at most so many rows of ``split``, the one that is scored.

    Raises:
        ValueError: lm-eval has no such task, it has no documents to train on, or a metric is not among its own.
    """
    lm_eval, metrics, rows = spec.lm_eval, spec.metrics, spec.rows
    opened = _opened(lm_eval, {key: str(path) for key, path in sources.items()})
    known = list(opened.aggregation())
    absent = [metric for metric in metrics if metric not in known]
    if absent or not metrics:
        raise Mistake(f"task {name}: lm-eval's {lm_eval} has the metrics {', '.join(known)}; got {list(metrics)}")
    whole = _documents(opened, name, rows)
    docs = {split: _drawn(found, rows[split], f"task {name}: {split}") for split, found in whole.items()}
    if limit is not None:
        docs[split] = docs[split].select(range(min(limit, len(docs[split]))))
    subsets = {
        split: f"{len(found)} of {len(whole[split])} documents{f', drawn by seed {SPLIT_SEED}' if rows[split] else ''}"
        for split, found in docs.items()
        if len(found) < len(whole[split])
    }
    harness = {split: _scoring(opened, found) for split, found in docs.items()}
    with quiet():
        frames = {split: pd.DataFrame(_texts(scored, tokenizer)) for split, scored in harness.items()}
    return Task(name, ("prompt",), None, tuple(metrics), spec.max_length, frames, harness=harness, subsets=subsets)


def _texts(scored, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """The prompts, and what each document is about where the task's ``doc_to_decontamination_query`` says that.

    A query that is a template is left out: it may have the task's format in it.
    """
    texts, query = {"prompt": prompts(scored, tokenizer)}, scored.config.doc_to_decontamination_query
    if scored.should_decontaminate() and (query in scored.features or callable(query)):
        texts[CONTENT] = [str(scored.doc_to_decontamination_query(doc)) for doc in scored.eval_docs]
    return texts


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


@cache
def _everything():
    """lm-eval's own tasks; thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _opened(task: str, metadata: Mapping[str, str]):
    """The lm-eval task with its documents."""
    from lm_eval.tasks import TaskManager

    with quiet():
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


def encoded(tokenizer: PreTrainedTokenizerBase, task: Task, split: str, count: int):
    """Token ids of the first prompts of a split, or of what its column is, as the tokenizer gives them."""
    (column,) = task.columns
    texts = task.splits[split][column].tolist()[:count]
    special = not begun(texts[0], tokenizer)  # the prompts of a task are written by one template
    return tokenizer(texts, truncation=True, max_length=task.max_length, add_special_tokens=special)


def begun(prompt: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a prompt begins with the token that begins a text, as chat templates write it."""
    return prompt.startswith(tokenizer.bos_token or "\0")


class quiet:
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
