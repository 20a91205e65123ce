"""A protocol is one entry: the plan, the records and the report take what they know of it from there."""

from support.results import add_run, fill, guess
from twinbench.protocol import BLIND, PAPER, PROTOCOLS, STRICT, Protocol
from twinbench.report.make import make

HALF = Protocol("half", "Every task keeps its biases, and none is told.", gold_biases=True, knows_task=False)


def test_only_the_strict_protocol_can_score_a_task_without_an_expert():
    assert [one.needs_expert for one in (STRICT, PAPER, BLIND, HALF)] == [False, True, True, True]


def test_a_fourth_protocol_is_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, HALF.name, HALF)
    add_run(fill(tmp_path), "h0", "ties", guess(0.7), protocol=HALF.name)
    folder = make(tmp_path, suite="toy")["folder"]
    text, page = ((folder / name).read_text(encoding="utf-8") for name in ("leaderboard.md", "index.html"))
    assert f"## half protocol\n\n{HALF.sentence}\n" in text
    assert text.index("## blind protocol") < text.index("## half protocol"), "in the order of the entries"
    assert f"<dt>half</dt><dd>{HALF.sentence}</dd>" in page
    assert (folder / "half_normalized.csv").exists()
