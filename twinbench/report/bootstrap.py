"""Bootstrap intervals and paired tests over test examples (Efron 1979; Koehn 2004 for the paired form).

Every run of a suite is resampled with the same draws, so a difference between two runs is paired. A resample is kept
as counts, how often each example was drawn, which is what ``twinbench.tasks.metrics`` scores.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from twinbench.report.blocks import Block, Column, Run
from twinbench.system.mistakes import Mistake
from twinbench.tasks.metrics import METRICS

if TYPE_CHECKING:
    import pandas as pd

SAMPLES = 1000
CELLS = 4_000_000  # counts held at once: 32 MB, however large the test split is
ROUNDING = 1e-9  # percent
Draws = dict[tuple[str, Column], np.ndarray]  # (run_id, column) -> the score of each resample, (SAMPLES,)


def draws(frames: "Mapping[str, pd.DataFrame]", found: list[Block]) -> Draws:
    """Resampled scores of the runs in ``found``; runs of one suite_id and split share their draws.

    Args:
        frames: per run_id its predictions on its block's split, where there are any (``read.predictions``).

    Raises:
        ValueError: two runs of a suite_id predicted different rows of a task, or hold different labels.
    """
    scores = {}
    for suite_id, split in dict.fromkeys((block.suite_id, block.split) for block in found):
        family = [block for block in found if (block.suite_id, block.split) == (suite_id, split)]
        runs = [run.run_id for block in family for row in block.rows for run in row.runs]
        scores |= resample({run: frames[run] for run in runs if run in frames}, family[0].columns)
    return scores


def resample(frames: "Mapping[str, pd.DataFrame]", columns: Iterable[Column]) -> Draws:
    """Score ``SAMPLES`` resamples of each task for every run.

    Args:
        frames: per run_id its predictions.
        columns: (task, primary metric); one without a ``statistic`` is left out.
    """
    scores = {}
    for task, metric in columns:
        runs, labels, predictions = _aligned(frames, task)
        rule = statistic(metric, labels) if runs else None
        if rule:
            chunks = [rule(counts, labels, predictions) for counts in _counts(task, len(labels))]
            scores |= {(run, (task, metric)): row for run, row in zip(runs, np.hstack(chunks), strict=True)}
    return scores


def statistic(metric: str, labels: np.ndarray) -> Callable | None:
    """The metric as a function of resampled examples (``twinbench.tasks.metrics``); None where it is none of them.

    Without labels the predictions are the examples' own scores, and the metric is their mean, whatever its name.
    """
    return METRICS.get(metric, _mean if np.isnan(labels).all() else None)


def averages(runs: list[Run], individual: list[Run], columns: list[Column], scores: Draws) -> np.ndarray | None:
    """The average normalized score of each resample in percent, (SAMPLES,), mean over the seeds in ``runs``.

    None where it is not defined: a run without predictions for a task, or an individual score of 0 or less in some
    resample (the ratio has no finite spread then).
    """
    ratios = []
    for column in columns:
        tops = [scores.get((run.run_id, column)) for run in runs]
        bottoms = [scores.get((run.run_id, column)) for run in individual]
        if not tops or not bottoms or any(draw is None for draw in tops + bottoms):
            return None
        bottom = np.mean(bottoms, axis=0)
        if (bottom <= 0).any():
            return None
        ratios.append(np.mean(tops, axis=0) / bottom)
    return 100 * np.mean(ratios, axis=0) if ratios else None


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of ``samples``."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def paired(samples: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """95 % interval of ``samples - reference`` and the two-sided p that they are equal.

    p is twice the smaller share of resamples on either side of 0, one added to each count so that it is never 0.
    """
    difference = samples - reference
    difference[np.abs(difference) < ROUNDING] = 0  # a matrix product may sum equal rows in another order
    side = min(np.sum(difference <= 0), np.sum(difference >= 0))
    return *interval(difference), min(1.0, float(2 * (side + 1) / (len(difference) + 1)))


def _aligned(frames: "Mapping[str, pd.DataFrame]", task: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Run ids, labels (n,) and predictions (runs, n) of a task, examples in the order of ``row``."""
    runs, predictions, rows, labels = [], [], None, None
    for run, frame in frames.items():
        mine = (frame["task"] == task).to_numpy()
        if not mine.any():
            continue
        order = np.argsort(frame["row"].to_numpy()[mine])
        row, label = (frame[name].to_numpy()[mine][order] for name in ("row", "label"))
        if rows is None:
            rows, labels = row, label
        elif not (np.array_equal(rows, row) and np.array_equal(labels, label, equal_nan=True)):
            raise Mistake(f"predictions of runs {runs[0]} and {run}, task {task}: other rows or labels, cannot pair")
        runs.append(run)
        predictions.append(frame["prediction"].to_numpy()[mine][order])
    return runs, labels, np.array(predictions)


def _counts(task: str, n: int) -> Iterator[np.ndarray]:
    """How often each of n examples is drawn in each resample, (n, resamples), a few resamples at a time.

    The draws depend on the task's name and n alone, so that every method and every later report sees the same ones.
    """
    generator = np.random.default_rng([zlib.crc32(task.encode()), n])
    step = max(1, CELLS // n)
    for start in range(0, SAMPLES, step):
        size = min(step, SAMPLES - start)
        drawn = generator.integers(0, n, size=(n, size), dtype=np.int32) * size + np.arange(size)
        yield np.bincount(drawn.ravel(), minlength=n * size).reshape(n, size).astype(float)


def _mean(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return predictions @ counts / len(labels)
