"""What a run took, and what a planned one will take by the records of others."""

from types import SimpleNamespace

import pytest

from twinbench.records.seconds import expected, words


def run(run_id: str, method: str, router: str | None, *tasks: float | None, **changes) -> list[dict]:
    """The rows of a run that merged for 1 s, trained its router for 10 s, routed a task in 0.5 s and scored it."""
    same = {"run_id": run_id, "time": "t", "status": "ok", "suite_id": "s", "split": "test", "precision": "float32"}
    same |= {"method": method, "params": {"scaling": 1}, "router": {"name": router} if router else None}
    same |= {"merge_seconds": 1.0, "router_seconds": 10.0 if router else 0.0, "route_seconds": 0.5}
    rows = [
        {"task": f"task{at}", "eval_seconds": took, "primary": primary}
        for at, took in enumerate(tasks)
        for primary in (True, False)  # two metrics of one pass
    ]
    return [same | row | changes for row in rows]


ROWS = [
    *run("a", "ties", None, 4.0, 5.0),  # 11 s
    *run("b", "average", None, 2.0, 2.0),  # 6 s
    *run("c", "twin_merging", "text", 3.0, 3.0),  # 18 s
    *run("d", "twin_merging", "text", 5.0, 5.0),  # 22 s
    *run("e", "twin_merging", "oracle", 1.0, 1.0),  # 14 s
    *run("k", "ties", None, 40.0, params={"scaling": 2}),  # 41.5 s and, beside the test, 9.5 s
    *[row | {"split": "validation_mismatched", "primary": False} for row in run("k", "ties", None, 9.0)],
    *run("f", "ties", None, 900.0, suite_id="other"),
    *run("g", "ties", None, 900.0, precision="bfloat16"),
    *run("h", "ties", None, 900.0, split="validation"),
    *run("i", "ties", None, 900.0, status="failed"),
    *run("j", "ties", None, None, 1.0),  # not timed
]


@pytest.mark.parametrize(
    ("method", "router", "scaling", "took"),
    [
        ("ties", None, 1, 11),
        ("ties", None, 2, 51),
        ("ties", None, 3, 31),  # the median of its method
        ("twin_merging", "text", 3, 20),  # of its method and router
        ("twin_merging", "mlp", 1, 18),  # of its method
        ("dare", None, 1, 16),  # of all
    ],
)
def test_the_runs_that_are_most_like_it_say_how_long_it_takes(method, router, scaling, took):
    job = SimpleNamespace(suite_id="s", split="test", precision="float32", method=method, params={"scaling": scaling})
    job.router = {"name": router} if router else None
    assert expected(ROWS, job) == pytest.approx(took)


def test_nothing_is_known_of_other_rows():
    job = SimpleNamespace(suite_id="new", split="test", precision="float32", method="ties", params={}, router=None)
    assert expected(ROWS, job) is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.4, "4 s"), (90.4, "90 s"), (90.6, "2 min"), (5369, "89 min"), (5400, "1 h 30 min"), (7500, "2 h 5 min")],
)
def test_a_time_is_said_as_a_person_would(seconds, said):
    assert words(seconds) == said
