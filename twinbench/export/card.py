"""The README.md of an exported model: what it is, how it scored, and how to load it in a few lines."""

import json
from collections.abc import Mapping
from pathlib import Path

import jinja2
from torch import Tensor

from twinbench.merging.merged import Merged, with_route
from twinbench.plan.job import Job
from twinbench.protocol import NORMALIZER, PROTOCOLS
from twinbench.records import store
from twinbench.records.record import UPPER
from twinbench.routing.router import Router
from twinbench.suite import Suite
from twinbench.tasks.metrics import predictions, score
from twinbench.weights.parts import LowRank
from twinbench.workbench import Workbench

EFFECT_ROWS = 128  # test rows per task on which the effect of the vectors is measured


def render(
    job: Job, suite: Suite, origins: Mapping[str, str], rows: list[dict], router: Router | None, effect: list[dict]
) -> str:
    """The card.

    Args:
        origins: where each expert comes from.
        rows: records; the newest of this job, and of individual under the strict protocol, give the scores.
        effect: as `vector_effect` returns it; empty where the model has no experts' parts.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["code"] = json.dumps
    template = environment.from_string(Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"))
    scores = _scores(job, rows)
    normalized = [line["normalized"] for line in scores]
    hub = job.base.removeprefix("hub:").partition("@")[0] if job.base.startswith("hub:") else None
    return template.render(
        job=job,
        knows_task=PROTOCOLS[job.protocol].knows_task,
        hub=hub,
        tasks=suite.tasks.values(),
        example=next(iter(suite.tasks.values())),
        origins=origins,
        scores=scores,
        mean=sum(normalized) / len(normalized) if normalized and None not in normalized else None,
        router=router,
        effect=effect,
    )


def vector_effect(
    bench: Workbench, merged: Merged, halves: Mapping[str, tuple[Mapping[str, LowRank], Mapping[str, Tensor]]]
) -> list[dict]:
    """What is lost where only the LoRA adapters are used, with the known task's own expert.

    Args:
        halves: per expert its matrices and its vectors.

    Returns:
        Per task: its metric on its first test rows, whole and without the vectors, and the largest change of a logit.
    """
    bare, lines = Merged(merged.shared, {expert: low for expert, (low, _) in halves.items()}), []
    kind = bench.suite.workload
    for name, task in bench.suite.tasks.items():
        rows = list(range(min(EFFECT_ROWS, len(task.splits["test"]))))
        route = [float(expert == name) for expert in merged.exclusive]
        logits = []
        for model in (merged, bare):
            with bench.answering(with_route(model, route)) as module:
                logits.append(kind.forward(bench, kind.classifier(bench.suite, name, module), name, "test", rows))
        labels, classes = task.labels("test")[rows], task.classes is not None
        whole, alone = (score(task.metrics[0], labels, predictions(found.numpy(), classes)) for found in logits)
        change = (logits[0] - logits[1]).abs().max().item()
        lines.append(
            {"task": name, "n": len(rows), "metric": task.metrics[0], "whole": whole, "alone": alone, "change": change}
        )
    return lines


def _scores(job: Job, rows: list[dict]) -> list[dict]:
    """Per task the primary score, that of its own expert, and their ratio (None where there is none)."""
    found = [row for row in store.latest(rows) if row["status"] == "ok" and row["primary"]]
    found = [row for row in found if row["split"] == job.split]
    individual = {
        row["task"]: row["value"]
        for row in found
        if (row["suite_id"], row["role"], row["route"], row["protocol"]) == (job.suite_id, UPPER, "task", NORMALIZER)
    }
    lines = []
    for row in found:
        if row["run_id"] == job.run_id:
            bound = individual.get(row["task"])
            line = {key: row[key] for key in ("task", "metric", "value", "n")}
            ratio = row["value"] / bound if bound is not None and bound > 0 else None
            lines.append(line | {"individual": bound, "normalized": ratio})
    return lines
