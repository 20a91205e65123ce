"""Bootstrap intervals and paired tests over the scored examples (Efron 1979; Koehn 2004 for the paired form).

Every run of a suite is resampled with the same draws, so a difference between two runs is paired. A resample is kept
as counts, how often each example was drawn, which is what ``twinbench.tasks.metrics`` scores. Where a row has several
seeds, a resample draws its seeds, too. docs/statistics.md says what an interval covers.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from twinbench.report.blocks import Block, Column, Run
from twinbench.system.mistakes import Mistake
from twinbench.tasks.metrics import METRICS, best_constant, score

if TYPE_CHECKING:
    import pandas as pd

SAMPLES = 10_000
FLOOR = 2 / (SAMPLES + 1)  # the smallest p that so many resamples can show
CELLS = 4_000_000  # counts held at once: 32 MB, however large the test split is
ROUNDING = 1e-9  # percent
Draws = dict[tuple[str, Column], np.ndarray]  # (run_id, column) -> the score of each resample, (SAMPLES,)


def draws(frames: "Mapping[str, pd.DataFrame]", found: list[Block]) -> tuple[Draws, dict[tuple[str, str], Run]]:
    """Resampled scores of the runs in ``found``; runs of one suite_id and split share their draws.

    Returns:
        The scores; and per suite_id and split the best constant answers as a run, which is among the scores.

    Args:
        frames: per run_id its predictions on its block's split, where there are any (``read.predictions``).

    Raises:
        ValueError: two runs of a suite_id predicted different rows of a task, or hold different labels.
    """
    scores, constants = {}, {}
    for key in dict.fromkeys((block.suite_id, block.split) for block in found):
        family = [block for block in found if (block.suite_id, block.split) == key]
        runs = [run.run_id for block in family for row in block.rows for run in row.runs]
        known = {run: frames[run] for run in runs if run in frames}
        answers = constant(known, family[0])
        if answers:
            constants[key], known[answers[0].run_id] = answers[0], answers[1]
        scores |= resample(known, family[0].columns)
    return scores, constants


def constant(frames: "Mapping[str, pd.DataFrame]", block: Block) -> "tuple[Run, pd.DataFrame] | None":
    """The best constant answer to each task as a run of its own, with its predictions; None if none is known.

    Rows without labels, such as lm-eval's, may say under ``constant`` what it scores.
    """
    import pandas as pd

    scores, made = {}, []
    for task, metric in block.columns:
        told = sorted(frames.values(), key=lambda frame: "constant" not in frame)  # older predictions lack it
        own = (frame[(frame["task"] == task).to_numpy()] for frame in told)
        rows = next((frame for frame in own if len(frame)), None)
        if rows is None:
            continue
        labels = rows["label"].to_numpy(dtype=float)
        if metric in METRICS and not np.isnan(labels).any():
            answers = np.full(len(labels), best_constant(metric, labels))
            scores[task, metric] = score(metric, labels, answers)
        elif np.isnan(labels).all() and rows.get("constant", rows["label"]).notna().all():
            answers = rows["constant"].to_numpy(dtype=float)
            scores[task, metric] = float(answers.mean())
        else:
            continue
        made.append(rows.assign(prediction=answers))
    name = f"best constant answer, {block.suite_id} {block.split}"
    return (Run(name, None, scores, {}, {}, []), pd.concat(made)) if made else None


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


def averages(
    runs: list[Run], individual: list[Run], columns: list[Column], scores: Draws, floor: Run | None = None
) -> np.ndarray | None:
    """The average normalized score of each resample in percent, (SAMPLES,), over the seeds in ``runs``.

    None where it is not defined: a run without predictions for a task, or a divisor of 0 or less in some resample (the
    ratio has no finite spread then).

    Args:
        floor: the best constant answer, whose score is subtracted above and below: the chance-corrected average.
    """
    ratios = []
    for column in columns:
        top, bottom = over_seeds(runs, column, scores), over_seeds(individual, column, scores)
        if top is None or bottom is None:
            return None
        if floor:
            least = scores.get((floor.run_id, column))
            if least is None:
                return None
            top, bottom = top - least, bottom - least
        if (bottom <= 0).any():
            return None
        ratios.append(top / bottom)
    return 100 * np.mean(ratios, axis=0) if ratios else None


def over_seeds(runs: list[Run], column: Column, scores: Draws) -> np.ndarray | None:
    """A row's score in each resample, (SAMPLES,), which draws the row's seeds with replacement; None if one has none.

    The k-th seeds of two rows are drawn together, and those of all tasks.
    """
    found = [scores.get((run.run_id, column)) for run in runs]
    if not found or any(draw is None for draw in found):
        return None
    if len(found) == 1:
        return found[0]
    size = len(found[0])
    drawn = np.random.default_rng(len(found)).multinomial(len(found), np.full(len(found), 1 / len(found)), size)
    return np.einsum("sk,ks->s", drawn / len(found), np.array(found))


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


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's (1979) correction of several p, (n,): with it, one false difference in a table has a chance of 5 %."""
    order = np.argsort(p)
    steps = p[order] * (len(p) - np.arange(len(p)))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected


def corrected(table: "pd.DataFrame") -> "pd.DataFrame":
    """The table with Holm's correction in place of each ``p``; ``p_least``: the resamples can show no smaller one."""
    return table.assign(p=holm(table["p"].to_numpy()), p_least=table["p"] <= FLOOR) if len(table) else table


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
