"""What a wrong route costs, against scores of whole models that transformers loads; and a router that goes by it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from transformers import AutoTokenizer, BertForSequenceClassification

from support.family import CLASSES, bench, frame, make_task, opened
from twinbench.merging.method import Method
from twinbench.routing import learned
from twinbench.routing.learned import Setting
from twinbench.routing.mlp import Mlp
from twinbench.routing.recipe import Features, Recipe, Use
from twinbench.routing.router import Router
from twinbench.workloads.classification.costs import costs

MODEL = Mlp(hidden_ratio=2.0, dropout=0.5, lr=5e-3, epochs=10, batch_size=16, balanced=True)
USE = {"top_k": 1, "groups": None, "minimum_risk": False, "tolerance": 0.0}


@torch.inference_mode()
def predicted(family, task: str, expert: str, texts: list[str]) -> np.ndarray:
    """The head of one expert, its pooler included, on the encoder of another, row by row."""
    model = BertForSequenceClassification.from_pretrained(family / "experts" / task).eval()
    other = BertForSequenceClassification.from_pretrained(family / "experts" / expert).bert
    model.bert.embeddings, model.bert.encoder = other.embeddings, other.encoder
    tokenizer = AutoTokenizer.from_pretrained(family / "base")
    rows = [model(**tokenizer(t, truncation=True, max_length=16, return_tensors="pt")).logits[0] for t in texts]
    return np.array([row.argmax().item() if CLASSES[task] else row[0].item() for row in rows], dtype=float)


@pytest.fixture
def suite(family):
    """The tiny family, with labels that its experts get right but for a fifth of the rows."""
    tasks, draw = {}, np.random.default_rng(3)
    for task, classes in CLASSES.items():
        frames = {"train": frame(task, 64, 0), "test": frame(task, 10, 1)}
        for rows in frames.values():
            label = predicted(family, task, task, rows["text"].tolist())
            wrong = draw.random(len(rows)) < 0.2
            rows["label"] = (
                np.where(wrong, (label + 1) % len(classes), label).astype(int)
                if classes
                else label + 0.5 * label.std() * draw.normal(size=len(rows))
            )
        tasks[task] = make_task(task, frames, rows={"train": 40, "validation": 24, "test": None})
    return opened(family, tasks=tasks)


def test_costs_are_what_the_normalized_score_loses(family, suite):
    found, _ = costs(bench(suite, 5))
    assert found.diag().numpy() == pytest.approx(np.zeros(3), abs=1e-9)
    assert found.abs().max() > 0.1, "the experts differ"
    for row, task in enumerate(CLASSES):
        rows = suite.tasks[task].splits["validation"]
        labels = rows["label"].to_numpy(dtype=float)
        own, *others = (predicted(family, task, e, rows["text"].tolist()) for e in (task, *CLASSES))
        for column, other in enumerate(others):
            if CLASSES[task]:  # an accuracy is linear in the rows that are lost: all of them cost what one does
                wanted = 1 - np.mean(other == labels) / np.mean(own == labels)
            else:
                scores = []
                for first in range(10):
                    mixed = own.copy()
                    mixed[first::10] = other[first::10]
                    scores.append((pearsonr(labels, mixed)[0] + spearmanr(labels, mixed)[0]) / 2)
                kept = (pearsonr(labels, own)[0] + spearmanr(labels, own)[0]) / 2
                wanted = 10 * (kept - np.mean(scores)) / kept
            assert found[row, column].item() == pytest.approx(wanted, abs=1e-4)


def test_an_expert_that_scores_nothing_is_named(suite):
    rows = suite.tasks["size"].splits["validation"]
    rows["label"] = -rows["label"]
    with pytest.raises(ValueError, match="the expert of size scores -0"):
        costs(bench(suite))


def test_a_router_of_a_suite_goes_by_its_costs(suite):
    own, reads = bench(suite), Features(None, None, "mean", 64, 40)
    careful, plain = (
        Setting(Method("none", "none", None), "router", Recipe(reads, MODEL, Use(**USE | {"minimum_risk": risk})), 0)
        for risk in (True, False)
    )
    router, seconds = learned.learned(own, careful)
    expected, took = own.remember("costs", None)
    likeliest, before = learned.learned(own, plain)
    assert likeliest.costs is None, "they share their training, not their decision"
    assert torch.equal(router.costs, expected) and seconds == before + took, "each is measured once"
    assert learned.router_bytes(own, careful, router, {}) > learned.router_bytes(own, plain, likeliest, {})
    for task in CLASSES:
        weights, _ = learned.weights(own, careful, task, "test")
        probable = router.logits(learned._features(own, careful, task, "test")[0]).softmax(1)
        losses = torch.stack([(probable * expected[:, expert]).sum(1) for expert in range(3)], 1)
        assert torch.equal(weights.argmax(1), losses.argmin(1))
        torch.testing.assert_close(weights.sort(1).values, torch.tensor([[0.0, 0, 1]]).expand(10, 3))


def overlapping(rows: int, seed: int):
    """Two tasks whose rows look alike near the border between them."""
    experts = torch.arange(rows) % 2
    return experts[:, None] + torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)), experts


def test_rows_that_are_dear_to_lose_are_lost_less_and_all_of_them_cost_less():
    (features, experts), held_out, test = overlapping(600, 0), overlapping(200, 1), overlapping(2000, 2)
    costs, found = torch.tensor([[0.0, 3.0], [0.5, 0.0]]), {}
    model = MODEL.fit((features, experts), held_out, 0)
    likeliest, alike, careful = (Router(model, Use(**USE), matrix) for matrix in (None, 1 - torch.eye(2), costs))
    for name, router in (("likeliest", likeliest), ("alike", alike), ("risk", careful)):
        route = router(test[0]).argmax(1)
        lost = [(route != test[1])[test[1] == expert].float().mean() for expert in (0, 1)]
        found[name] = route, lost[0], costs[test[1], route].mean()
    assert torch.equal(found["alike"][0], found["likeliest"][0]), "where all mistakes cost the same it is the likeliest"
    assert found["risk"][1] < 0.5 * found["likeliest"][1]
    assert found["risk"][2] < 0.8 * found["likeliest"][2]


@pytest.mark.parametrize(("balanced", "top_k"), [(False, 1), (True, None), (True, 2)])
def test_risk_is_of_one_expert_and_of_tasks_that_count_alike(balanced, top_k):
    with pytest.raises(ValueError, match=r"router\.use\.minimum_risk must be false unless"):
        use = Use(**USE | {"minimum_risk": True, "top_k": top_k})
        Recipe(Features(None, None, "mean", 8, None), replace(MODEL, balanced=balanced), use)
