"""Published scores beside ours."""

import re

import numpy as np
import pandas as pd
import pytest

from support.results import add_run, computed, guess
from twinbench.records.record import completed
from twinbench.report import blocks, literature


def test_published_scores_stand_apart_and_are_subtracted_only_from_the_same_work(tmp_path, monkeypatch):
    """Under their own protocol, with their source, and never as one of our rows."""
    fields = {"source": "A paper", "where": "Table 1", "how": "quoted", "checkpoints": "theirs", "base": "me/base"}
    fields |= {"protocol": "paper", "unit": "normalized %", "note": ""}
    numbers = [("average", "topic", 60.0), ("average", "average", 61.5), ("ties", "average", 70.0)]
    lines = [fields | {"method": method, "task": task, "value": value} for method, task, value in numbers]
    lines.append(fields | {"method": "average", "task": "mood", "value": 99.0, "unit": "points"})
    (tmp_path / "literature").mkdir()
    pd.DataFrame(lines).to_csv(tmp_path / "literature" / "toy.csv", index=False)
    monkeypatch.setattr(literature, "FOLDER", tmp_path / "literature")
    add_run(tmp_path, "a0", "individual", guess(0.95), router={"name": "oracle"})
    for run_id, method, base in (("p0", "average", "hub:me/base@1"), ("p1", "ties", "hub:you/base@1")):
        add_run(tmp_path, run_id, method, guess(0.5), protocol="paper", base=base)
    found = computed(tmp_path)
    assert "published" not in found["new", "strict"]
    normalized, published = (found["new", "paper"][name].set_index("method") for name in ("normalized", "published"))
    assert published.loc["average", "topic"] == 60.0
    assert published.loc["average", "difference"] == pytest.approx(normalized.loc["average", "average"] - 61.5)
    assert published.loc["ties", "ours"] == normalized.loc["ties", "average"]
    assert np.isnan(published.loc["ties", "difference"]), "other experts are other work"
    assert np.isnan(published.loc["average", "mood"]), "points are no percentages"
    assert published.loc["ties", "source"] == "A paper, Table 1 (quoted); theirs"


def generative(suite: str, base: str) -> dict[tuple[str, str], pd.Series]:
    """What was published beside a block of ``suite``: per method and how it came to us one line.

    Our scores: individual 0.5 on every task, Twin-Merging 0.6, so an average of 120 %.
    """
    rows = []
    for method, value in (("individual", 0.5), ("twin_merging", 0.6)):
        run = {"run_id": method, "time": "2026", "status": "ok", "suite": suite, "suite_id": suite, "base": base}
        run |= {"method": method, "params": {}, "router": None, "protocol": "strict", "seed": None, "split": "test"}
        tasks = {"mmlu": "accuracy", "truthful_qa": "accuracy", "bbq": "accuracy", "cnn_dailymail": "rouge2"}
        rows += [run | {"task": t, "metric": m, "primary": True, "value": value, "n": 9} for t, m in tasks.items()]
    (block,) = blocks.blocks(map(completed, rows))
    ours = pd.DataFrame({"method": ["individual", "twin_merging"], "average": [100.0, 120.0]})
    lines = [line for _, line in literature.published(block, ours).iterrows()]
    return {(line["method"], re.search(r"\((\w+)\); ", line["source"]).group(1)): line for line in lines}


def test_the_papers_generative_scores_stand_beside_both_generative_suites():
    qwen = generative("generative_qwen", "hub:Qwen/Qwen-14B@c4051215")
    small = generative("generative_smollm", "wheel smollm==1.0")
    assert qwen.keys() == small.keys()
    twin = qwen["twin_merging", "quoted"]
    assert twin["average"] == 102.38 and twin["ours"] == 120
    assert twin["difference"] == pytest.approx(17.62)
    assert small["twin_merging", "quoted"]["ours"] == 120
    assert pd.isna(small["twin_merging", "quoted"]["difference"]), "another base is other work"
    assert [qwen[m, "derived"]["average"] for m in ("ties", "dare")] == pytest.approx([102.38 - 9.71, 102.38 - 3.86])
    tasks = ["mmlu", "truthful_qa", "bbq", "cnn_dailymail"]
    assert twin[tasks].isna().all(), "the README's are points"
    figure = {method: line for (method, how), line in qwen.items() if how == "digitised"}
    assert figure["twin_merging"][tasks].tolist() == [99.7, 98.1, 96.8, 114.3]
    whole = [line for line in figure.values() if line[tasks].notna().all()]
    assert len(whole) == 5
    for line in whole:
        assert line["average"] == pytest.approx(line[tasks].mean(), abs=0.051)
    for method in ("task_arithmetic", "dare"):
        assert "perhaps swapped" in figure[method]["source"]
