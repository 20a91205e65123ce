"""The lead of each row over the unmerged base, on tasks that have no expert."""

import numpy as np
import pytest

from twinbench.records.record import completed
from twinbench.report import bootstrap, unseen
from twinbench.report.blocks import Block, Row, Run

SEEN, NEW, OTHER = ("seen", "accuracy"), ("new", "accuracy"), ("other", "accuracy")


def row(name: str, role: str | None, **scores: float) -> Row:
    records = [completed({"task": t, "expert": "fine-tuned" if t == "seen" else None, "router": None}) for t in scores]
    values = {(task, "accuracy"): value for task, value in scores.items()}
    return Row(name, name, False, [Run(name, None, values, {}, {}, records)], {}, role)


@pytest.fixture
def block() -> Block:
    rows = [
        row("average", None, seen=0.9, new=0.6, other=0.7),
        row("bare", None, seen=0.9, new=0.6, other=0.7),
        row("pretrained", "lower bound", seen=0.5, new=0.5, other=0.8),
    ]
    return Block("toy", "id", "test", "float32", "strict", [SEEN, NEW, OTHER], rows, [], [], [], [], [])


def test_the_lead_is_in_points_and_only_of_tasks_without_an_expert(block):
    steps = np.linspace(-0.1, 0.1, 1001)
    draws = {("average", NEW): 0.6 + steps, ("average", OTHER): np.full(1001, 0.7)}
    draws |= {("pretrained", NEW): np.full(1001, 0.5), ("pretrained", OTHER): np.full(1001, 0.8)}
    found = unseen.unseen(block, draws)
    assert found["method"].tolist() == ["average"], "rows without predictions have none"
    line = found.iloc[0]
    assert not [name for name in found if name.startswith("seen")]
    assert line[["new", "other", "average"]].tolist() == pytest.approx([10, -10, 0])
    assert line[["new_low", "new_high"]].tolist() == pytest.approx([0.5, 19.5])
    assert line[["average_low", "average_high"]].tolist() == pytest.approx([-4.75, 4.75])
    assert line["p"] == 1 and not line["p_least"]


def test_without_a_base_or_such_a_task_there_is_no_table(block):
    assert not len(unseen.unseen(block, {}))
    known = Block("toy", "id", "test", "float32", "strict", [SEEN], block.rows, [], [], [], [], [])
    assert not len(unseen.unseen(known, {("average", SEEN): np.ones(3), ("pretrained", SEEN): np.ones(3)}))
    assert not len(bootstrap.corrected(unseen.unseen(block, {})))
