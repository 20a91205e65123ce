"""How long a planned run will take, by the records of others."""

from types import SimpleNamespace

import pytest

from twinbench.records import expected


def run(run_id: str, method: str, router: str | None, *tasks: float | None, **changes) -> list[dict]:
    """The rows of a run that merged for 1 s, trained its router for 10 s, routed a task in 0.5 s and scored it."""
    same = {"run_id": run_id, "time": "t", "status": "ok", "suite_id": "s", "split": "test", "precision": "float32"}
    same |= {"method": method, "router": {"name": router} if router else None}
    same |= {"merge_seconds": 1.0, "router_seconds": 10.0 if router else 0.0, "route_seconds": 0.5}
    rows = [{"task": f"task{at}", "eval_seconds": took} for at, took in enumerate(tasks) for _ in ("acc", "f1")]
    return [same | row | changes for row in rows]


ROWS = [
    *run("a", "ties", None, 4.0, 5.0),  # 11 s
    *run("b", "average", None, 2.0, 2.0),  # 6 s
    *run("c", "twin_merging", "text", 3.0, 3.0),  # 18 s
    *run("d", "twin_merging", "text", 5.0, 5.0),  # 22 s
    *run("e", "twin_merging", "oracle", 1.0, 1.0),  # 14 s
    *run("f", "ties", None, 900.0, suite_id="other"),
    *run("g", "ties", None, 900.0, precision="bfloat16"),
    *run("h", "ties", None, 900.0, split="validation"),
    *run("i", "ties", None, 900.0, status="failed"),
    *run("j", "ties", None, None, 1.0),  # not timed
]


@pytest.mark.parametrize(
    ("method", "router", "took"),
    [
        ("ties", None, 11),
        ("twin_merging", "text", 20),
        ("twin_merging", "mlp", 18),  # the method's median
        ("dare", None, 14),  # that of all
    ],
)
def test_the_runs_that_are_most_like_it_say_how_long_it_takes(method, router, took):
    job = SimpleNamespace(suite_id="s", split="test", precision="float32", method=method)
    job.router = {"name": router} if router else None
    assert expected.seconds(ROWS, job) == pytest.approx(took)


def test_nothing_is_known_of_other_rows():
    job = SimpleNamespace(suite_id="new", split="test", precision="float32", method="ties", router=None)
    assert expected.seconds(ROWS, job) is None


@pytest.mark.parametrize(("seconds", "words"), [(4.4, "4 s"), (119, "2 min"), (3600, "60 min"), (7500, "2 h 5 min")])
def test_a_time_is_said_as_a_person_would(seconds, words):
    assert expected.told(seconds) == words
