"""Scoring a generative task: lm-eval asks the live model, under the route of each prompt."""

import time
from importlib.metadata import version

import numpy as np
import pandas as pd

from twinbench.routing.learned import Setting, applied
from twinbench.system import processes
from twinbench.tasks.lm_eval.scoring import ROUGE
from twinbench.workbench import Workbench, merged
from twinbench.workloads.generation.data import MULTITURN, quiet


def score(
    bench: Workbench, setting: Setting, task: str, split: str, chosen: np.ndarray | None
) -> tuple[dict[str, float], pd.DataFrame, float, dict]:
    """Let lm-eval score a split of a task.

    Args:
        chosen: not used: there are no heads.

    Returns:
        The task's metrics, the primary one first, and that one by subject where documents have one; per document its
        row, its primary score as ``prediction`` (a label it has none), lm-eval's hash of its prompt, what was answered
        and what the best constant answer scores; the seconds that it took; and for the records ``warnings``, the
        ``harness``, lm-eval's version and the task's, and the ``subset`` of the documents, None for all.
    """
    spec = bench.suite.tasks[task]
    key = "evaluated", setting, task, split
    results, seconds, said = bench.remember(key, lambda: _evaluated(bench, setting, task, split))
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
            "constant": constant(spec.harness[split], spec.metrics[0]),
        }
    )
    if "subject" in samples[0]["doc"]:  # MMLU's
        subjects = frame.groupby([sample["doc"]["subject"] for sample in samples])["prediction"].mean()
        values |= {f"{spec.metrics[0]}/{subject}": float(value) for subject, value in subjects.items()}
    by = f"lm-eval {version('lm_eval')}, {spec.harness[split].config.task} {spec.harness[split].VERSION}"
    return values, frame, seconds, {"warnings": said, "harness": by, "subset": spec.subsets.get(split)}


def constant(scored, metric: str) -> list[float]:
    """Per document what the best answer scores that does not read it; NaN where that is not known.

    Known are the accuracy of a choice and ROUGE. Options that all documents share (letters) are answered with the one
    that is right most often, others by a guess. A summary is left out, which scores 0.

    Args:
        scored: an lm-eval task, whose documents are scored.
        metric: its primary one.
    """
    docs = list(scored.eval_docs)
    unknown = [float("nan")] * len(docs)
    if scored.OUTPUT_TYPE != "multiple_choice" or metric not in ("acc", "acc_norm"):
        return [0.0] * len(docs) if metric in ROUGE else unknown
    options = [
        # TruthfulQA's options are followed by those of another metric.
        tuple(doc["mc1_targets"]["choices"] if "mc1_targets" in doc else scored.doc_to_choice(doc))
        for doc in docs
    ]
    if len(set(options)) > 1:
        return [1 / len(each) for each in options]
    given = [scored.doc_to_target(doc) for doc in docs]
    places = [options[0].index(target) if target in options[0] else target for target in given]
    if not all(isinstance(place, int) for place in places):
        return unknown
    most = max(set(places), key=places.count)
    return [float(place == most) for place in places]


def _evaluated(bench: Workbench, setting: Setting, task: str, split: str) -> tuple[dict, float, list[str]]:
    """What lm-eval says of a split of a task under the merged model, the seconds that it took, and warnings."""
    from lm_eval.evaluator import evaluate

    (made, _), spec = merged(bench, setting.method, setting.gold_biases), bench.suite.tasks[task]
    weights = applied(bench, setting, task, split)
    model = bench.remember("served", lambda: _served(bench))
    model._max_length = spec.max_length
    tolerance = setting.router.use.tolerance if setting.router else 0.0
    start = time.perf_counter()
    with quiet(), model.serving(made, weights, tolerance):
        results = evaluate(
            model,
            {"tasks": {task: spec.harness[split]}, "groups": {}, "group_map": {}},
            bootstrap_iters=0,
            apply_chat_template=bench.suite.tokenizer.chat_template is not None,
            fewshot_as_multiturn=MULTITURN,
        )
        said = processes.gathered(model.warnings)
        return results, time.perf_counter() - start, list(dict.fromkeys(said))


def _served(bench: Workbench):
    from twinbench.workloads.generation.served import Served  # lm-eval's models take seconds to import

    with quiet():
        return Served(bench, max_length=1)
