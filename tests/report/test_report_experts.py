"""What a report tells of the experts and of the data."""

from pathlib import Path

import pandas as pd
import pytest

from support.results import TASKS, N, add_run, fill, guess
from twinbench.records import store
from twinbench.report.make import make


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return fill(tmp_path)


def add_experts(results: Path, suite_id: str = "new", **changes) -> None:
    """Write how the experts of ``TASKS`` were trained: a log as transformers keeps it, two epochs and three."""
    recipe = {"epochs": 2, "batch_size": 16, "lr": 1e-4, "weight_decay": 0.01, "warmup": 0.06, "freeze": [], "seed": 0}
    training = {}
    for place, (name, metric) in enumerate(TASKS.items()):
        log = []
        for epoch in range(1, 3 + place):
            log.append({"loss": 1 / epoch, "learning_rate": 1e-4, "epoch": float(epoch), "step": 5 * epoch})
            log.append({"eval_loss": 2 / epoch, f"eval_{metric}": 0.5 + 0.1 * epoch, "epoch": float(epoch)})
        log.append({"train_runtime": 9.0, "train_loss": 0.5, "epoch": 2.0 + place})
        training[name] = {"expert": f"{name}-0", "data": "wheel toys==1.0", "rows": {"train": 700, "validation": 80}}
        training[name] |= {"loss": "squared error", "metric": metric, "recipe": recipe, "curve": log}
        training[name] |= {"seconds": 12.4, "device": "cpu", "torch": "2"} | changes
    store.write_experts(results, suite_id, training)


def test_experts_are_told_with_their_recipe_and_learning_curves(results):
    before = make(results, suite="toy")
    assert not [name for name in before["tables"] if name.startswith(("experts_", "data_"))]
    add_experts(results)
    made = make(results, suite="toy")
    found = {name: made["tables"][f"experts_{name}"].set_index("task") for name in ("training", "learned", "seconds")}
    assert found["training"].loc["mood", ["rows", "epochs", "learning rate", "batch size"]].tolist() == [
        700,
        2,
        1e-4,
        16,
    ]
    assert found["learned"].loc["topic", ["epoch 1", "epoch 2", "last"]].tolist() == pytest.approx([60, 70, 70])
    assert pd.isna(found["learned"].loc["topic", "epoch 3"])
    assert found["learned"].loc["mood", "last"] == pytest.approx(80)
    assert found["seconds"]["training"].tolist() == [12.4, 12.4]
    curve = pd.read_csv(made["folder"] / "experts_learning.csv").set_index(["task", "epoch"])
    assert len(curve) == 2 + 3
    assert curve.loc[("mood", 3), ["training_loss", "held_out_loss", "value"]].tolist() == pytest.approx(
        [1 / 3, 2 / 3, 0.8]
    )
    for name in ("leaderboard.md", "experts.md", "index.html"):
        text = (made["folder"] / name).read_text(encoding="utf-8")
        assert "How the experts were trained" in text and "Held-out score after each epoch (points)" in text
    assert r"topic & 700 & 2 & 0.0001 & 16" in (made["folder"] / "experts.tex").read_text(encoding="utf-8")
    drawing = made["figures"]["experts_learning"].with_suffix(".svg").read_text(encoding="utf-8")
    for words in ("topic", "mood", "loss: squared error", "accuracy (points)", "pearson (points)", "epoch"):
        assert f">{words}</text>" in drawing
    same = before["tables"]["strict_normalized"]
    pd.testing.assert_frame_equal(made["tables"]["strict_normalized"], same)


def test_a_diverged_training_is_shown_without_its_numbers(results):
    log = [{"loss": None, "epoch": 1.0}, {"eval_loss": None, "eval_accuracy": None, "epoch": 1.0}]
    add_experts(results, curve=log)
    made = make(results, suite="toy")
    assert made["tables"]["experts_learned"][["epoch 1", "last"]].isna().all(axis=None)
    assert made["figures"]["experts_learning"].exists()


def test_experts_stand_with_their_own_suite_id(results):
    add_run(results, "f0", "average", guess(0.7), suite_id="old", time="2025-01-01T00:00:00+00:00")
    add_experts(results, "old")
    made = make(results, suite="toy")
    assert {"experts_old_training", "data_old_origins"} <= made["tables"].keys()
    assert "experts_training" not in made["tables"] and "experts_old_learning" not in made["figures"]
    page = (made["folder"] / "index.html").read_text(encoding="utf-8")
    assert page.index("other experts or data") < page.index("How the experts were trained")


def test_a_file_of_experts_that_is_none_is_one_clear_error(results):
    (results / "experts").mkdir()
    for text in ("{", "[]"):
        (results / "experts" / "new.json").write_text(text)
        with pytest.raises(ValueError, match=r"new\.json: not "):
            make(results, suite="toy")
    for text, lacks in (('{"topic": 1}', "rows, recipe, .*, epochs"), ('{"topic": {"rows": {}}}', "recipe, curve, .*")):
        (results / "experts" / "new.json").write_text(text)
        with pytest.raises(ValueError, match=rf"experts/new\.json: task topic lacks {lacks}"):
            make(results, suite="toy")


def test_data_is_told_with_its_origin_and_a_local_copy_is_called_one(tmp_path):
    hub, local = "nyu-mll/glue@bcdcba79/qqp", "local folder qqp, sha256 0123456789ab"
    for folder, origin in (("a", hub), ("b", local)):
        add_run(tmp_path / folder, "a0", "average", guess(0.5), data=origin)
        made = make(tmp_path / folder, suite="toy")
        assert made["tables"]["data_origins"].to_numpy().tolist() == [["topic", N, origin], ["mood", N, origin]]
        for name in ("leaderboard.md", "index.html"):
            text = (made["folder"] / name).read_text(encoding="utf-8")
            told = "local copy: topic, mood. A local copy may differ from the official split" in text
            assert origin in text and told == (origin == local)


def test_data_of_older_records_is_told_by_the_file_of_their_experts(results):
    add_experts(results, data="local folder qqp, sha256 0123456789ab")
    found = make(results, suite="toy")["tables"]["data_origins"].set_index("task")
    assert found.loc["mood"].tolist() == [700, 80, N, "local folder qqp, sha256 0123456789ab"]
