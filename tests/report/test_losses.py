"""Where a routed method loses: each loss against the averages of the rows that it lies between."""

import numpy as np
import pytest

from support.results import add_run, guess, table
from twinbench.report.make import make

TA = {"shared": {"method": "task_arithmetic", "scaling": 0.3}}


@pytest.fixture
def results(tmp_path):
    """Twin-Merging at two ranks, one of them told the task, too; SMILE; and the models without their parts."""
    told = {"router": {"name": "oracle"}, "route": "task"}
    add_run(tmp_path, "a0", "individual", guess(0.95), **told)
    add_run(tmp_path, "a1", "pretrained", guess(0.2), route=None)
    add_run(tmp_path, "a2", "task_arithmetic", guess(0.5), params={"scaling": 0.3}, route=None)
    add_run(tmp_path, "a3", "task_arithmetic", guess(0.4), params={"scaling": 0.5}, route=None)
    for tag, ratio, quality, how in (
        ("b0", 0.1, 0.8, {"router": {"name": "mlp"}, "route": "router"}),
        ("b1", 0.1, 0.7, {"router": {"name": "knn"}, "route": "router"}),
        ("b2", 0.1, 0.93, told),
        ("b3", 0.5, 0.85, {"router": {"name": "mlp"}, "route": "router"}),
    ):
        add_run(tmp_path, tag, "twin_merging", guess(quality), params={"rank_ratio": ratio} | TA, **how)
    add_run(tmp_path, "c0", "smile", guess(0.6), params={"rank": 8}, route="layer")
    add_run(tmp_path, "c1", "smile", guess(0.9), params={"rank": 8}, **told)
    return tmp_path


def test_a_loss_is_the_distance_of_two_rows(results):
    found, scores = table(results, "losses"), table(results)["average"]
    labels = {tag: f"twin_merging (rank_ratio=0.1, router={tag})" for tag in ("mlp", "knn", "oracle")}
    assert list(found.index) == [labels["mlp"], labels["knn"], "smile (router=none)"], "the best first"
    for router in ("mlp", "knn"):
        row = found.loc[labels[router]]
        assert row["average"] == pytest.approx(scores[labels[router]])
        assert row["lost to the route"] == pytest.approx(scores[labels["oracle"]] - scores[labels[router]])
        assert row["lost to the parts"] == pytest.approx(100 - scores[labels["oracle"]])
        assert row["without parts"] == pytest.approx(scores["task_arithmetic (scaling=0.3)"])
        assert row["lost to the route_low"] < row["lost to the route"] < row["lost to the route_high"]
    assert found.loc["smile (router=none)", "without parts"] == pytest.approx(scores["pretrained"])
    assert found.loc[labels["knn"], "lost to the route_low"] > 0


def test_what_was_not_run_is_empty_or_left_out(results):
    for tag in ("a2", "c1"):
        (results / "records" / f"{tag}.jsonl").unlink()
    found = table(results, "losses")
    assert len(found) == 2 and found["without parts"].isna().all(), "SMILE has no row that is told the task"
    text = (make(results, suite="toy")["folder"] / "leaderboard.md").read_text()
    assert "Where a routed method loses" in text and np.isfinite(found["lost to the parts"]).all()


def test_a_model_without_parts_that_lacks_a_task_has_no_average(results):
    (results / "predictions" / "a2.parquet").unlink()
    add_run(results, "a2", "task_arithmetic", {"topic": guess(0.5)["topic"]}, params={"scaling": 0.3}, route=None)
    found = table(results, "losses")
    assert np.isnan(found.loc["twin_merging (rank_ratio=0.1, router=mlp)", "without parts"])


def test_static_methods_alone_have_no_such_table(tmp_path):
    add_run(tmp_path, "a0", "individual", guess(0.95), router={"name": "oracle"}, route="task")
    add_run(tmp_path, "a2", "task_arithmetic", guess(0.5), params={"scaling": 0.3}, route=None)
    with pytest.raises(KeyError):
        table(tmp_path, "losses")
