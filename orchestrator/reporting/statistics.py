"""Paired statistics: how sure a difference of two models, or a place on a front, is.

Two models mostly err on the same items, so their difference is known far better than either score.
Items are matched by hash, task by task, over all models at once; items that only some models have
are left out and counted. Then a bootstrap: each draw takes as many items as there are, with
replacement, and scores all models on them, so what the items have in common cancels in differences
and ratios. Each task is drawn separately. For models that were trained with several seeds, each
draw first draws seeds, the same ones for all models that have as many: those of one seed read the
same batches, and a student comes from its seed's teacher. A draw is a count for each item and a
score is a ratio of sums, so one matrix product scores all models.

The intervals do not cover other trainings of models with one seed, nor other texts to take items
from. They are too short where few items differ. Whether a model keeps a share of another one's
accuracy is decided by the few items that it alone loses: `Scores.cautious_ratio` counts one more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.records.evaluation import (
    BITS_METRIC,
    EvaluationResult,
    TaskResult,
    accuracy_among,
)
from orchestrator.terminal.metrics import (
    CONFIDENCE_KEEPS_99,
    CONFIDENCE_ON_FRONT,
    PAIRED_SHARE_OF_FULL,
    QUALITY,
)

NUM_RESAMPLES = 10_000
INTERVAL_LEVEL = 0.95
"""Share of the draws inside an interval; the rest lies outside in equal parts."""
MAX_COUNTS_PER_BLOCK = 2_000_000
"""Bounds the memory of `draw_item_counts`."""
DEMANDED_SHARE = 0.99
"""A model keeps the full model's quality if it reaches this share of it, unless a user demands
another one."""
SUMMARY_METRICS = (PAIRED_SHARE_OF_FULL, CONFIDENCE_KEEPS_99, CONFIDENCE_ON_FRONT)
"""Numbers that a model's run has as metrics; its differences to others are rows of a table."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A number, and the range that contains most of its draws."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the range lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Scores:
    """One quality of every model, as measured and in every draw."""

    observed: Floats
    """(models,)"""
    drawn: Floats
    """(resamples, models)"""

    def interval(self, model: int) -> Interval:
        """Return a model's score with its interval."""
        return interval_of(self.observed[model], self.drawn[:, model])

    def difference(self, model: int, other: int) -> Interval:
        """Return a model's score minus another one's over the same draws."""
        drawn = self.drawn[:, model] - self.drawn[:, other]
        return interval_of(self.observed[model] - self.observed[other], drawn)

    def ratio(self, model: int, other: int) -> tuple[Interval, Floats] | None:
        """Return a model's score over another one's: its interval and all its draws.

        None if the divisor is zero in a draw, as with few items and a weak model.
        """
        if min(self.observed[other], self.drawn[:, other].min()) <= 0:
            return None
        drawn = self.drawn[:, model] / self.drawn[:, other]
        return interval_of(self.observed[model] / self.observed[other], drawn), drawn

    def cautious_ratio(
        self, model: int, other: int, *, num_items: int
    ) -> tuple[Interval, Floats] | None:
        """Return `ratio` of two accuracies, with one item more on which the model alone fails.

        The items at hand say little of how rare such items are: where none of them tells two models
        apart, no draw does. The item more has a weight as in a Bayesian bootstrap, Beta(1, items),
        so without a lost item the share of lost ones is distributed as its exact bounds are
        (Clopper and Pearson, 1934), and it grows with each item that is lost.

        In a simulation of models that keep exactly 99%, of 40 to 2,000 items, a confidence of 0.95
        is reached in 0 to 6% of the runs; without the item it is in up to 86%. The upper end of the
        interval is that of `ratio`: nothing speaks for more than what was measured.

        None if the other one's accuracy is zero in a draw.
        """
        ratio = self.ratio(model, other)
        if model == other or ratio is None:
            return ratio
        interval, _ = ratio
        # Each pair has its own draws: equal ones would cancel in differences of two ratios.
        random = np.random.default_rng((0, model, other))
        weight = random.beta(1, num_items, len(self.drawn))
        answered = (1 - weight) * self.drawn[:, model]
        answered_by_other = (1 - weight) * self.drawn[:, other] + weight
        drawn = answered / answered_by_other
        return replace(interval_of(interval.value, drawn), high=interval.high), drawn


def interval_of(value: float, drawn: Floats, *, level: float = INTERVAL_LEVEL) -> Interval:
    """Return a number with the percentile interval of its draws."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def mean_scores(tasks: Sequence[Scores]) -> Scores:
    """Return the unweighted mean over several tasks."""
    assert tasks, "a mean needs at least one task"
    observed = sum(task.observed for task in tasks) / len(tasks)
    drawn = sum(task.drawn for task in tasks) / len(tasks)
    return Scores(np.asarray(observed), np.asarray(drawn))


# Items that all models answered


@dataclass(frozen=True)
class ItemValues:
    """The same items of one task under every run of every model."""

    metric: str
    """The metric that is compared."""
    values: Floats
    """(runs, items): what each item adds to a run's score, such as 1 for a right answer."""
    weights: Floats
    """(items,): what each item adds to the divisor: 1 for a mean, bytes for bits per byte."""


@dataclass(frozen=True)
class PairedScores:
    """Scores of all models on the items that all of them answered."""

    evaluations: Mapping[str, Sequence[EvaluationResult]]
    """Key of a model -> its evaluations, one for each seed."""
    items: Mapping[str, ItemValues]
    """Task -> its items."""
    scores: Mapping[str, Scores]
    """Task -> the scores of the models, in the order in which they were given."""
    groups: Mapping[str, tuple[str, ...]]
    """Group that counts as one task in the average -> its tasks."""
    left_out: Mapping[str, int]
    """Task -> number of items that only some of the models answered."""

    @property
    def metrics(self) -> dict[str, str]:
        """Task -> the metric that is compared."""
        return {task: items.metric for task, items in self.items.items()}

    @property
    def beside(self) -> set[str]:
        """The tasks that are in no average."""
        runs = (run for seeds in self.evaluations.values() for run in seeds)
        return {name for run in runs for name in run.beside}

    @property
    def number_of(self) -> dict[str, int]:
        """Key of a model -> its number in the scores."""
        return {key: number for number, key in enumerate(self.evaluations)}

    def num_items(self, quality: str) -> int:
        """Return the number of the items that a quality is computed from."""
        tasks = [task for term in self._terms(quality) for task in term]
        return sum(len(self.items[task].weights) for task in tasks)

    def quality(self, name: str) -> Scores | None:
        """Return the scores of a tracked quality; None if it has no values by item.

        Args:
            name: `quality/accuracy` (the average of `EvaluationResult.accuracy`, where a group
                counts as one task), `quality/bits_per_byte`, or a task's compared metric as
                `quality/TASK/METRIC`.
        """
        means = [mean_scores([self.scores[task] for task in term]) for term in self._terms(name)]
        return mean_scores(means) if means else None

    def _terms(self, quality: str) -> list[list[str]]:
        """Return the terms of the average that a quality is, each as its tasks.

        A term is one task, or a group whose tasks count as one. A quality without values by item
        has none.
        """
        key = quality.removeprefix(QUALITY)
        metrics = self.metrics
        averaged = [task for task in metrics if task not in self.beside]
        if key == BITS_METRIC:
            return [[task] for task in averaged if metrics[task] == BITS_METRIC]
        if key != "accuracy":
            task, _, metric = key.rpartition("/")
            return [[task]] if metrics.get(task) == metric else []
        tasks = [task for task in averaged if metrics[task] != BITS_METRIC]
        grouped = {task for members in self.groups.values() for task in members}
        terms = [[task] for task in tasks if task not in grouped]
        for members in self.groups.values():
            terms.append([task for task in members if task in tasks])
        return [term for term in terms if term]


def pair_scores(
    evaluations: Mapping[str, Sequence[EvaluationResult]],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> PairedScores | None:
    """Score all models on draws of the items that all answered; None if there is no such item.

    Args:
        evaluations: Key of a model -> its evaluations, one for each seed.
        num_resamples: Number of draws.
        seed: The same seed gives the same draws.
    """
    runs = [run for seeds in evaluations.values() for run in seeds]
    num_seeds = [len(seeds) for seeds in evaluations.values() if seeds]
    items: dict[str, ItemValues] = {}
    left_out: dict[str, int] = {}
    for name in dict.fromkeys(name for run in runs for name in run.results):
        results = [run.results[name] for run in runs if name in run.results]
        positions = [_positions(result) for result in results]
        left_out[name] = len(set().union(*positions))
        metric = shared_metric(results)
        common = [item for item in positions[0] if all(item in places for places in positions)]
        if metric is None or not common or len(results) < len(runs):
            continue
        left_out[name] -= len(common)
        rows = [
            np.asarray([result.values[metric][position[item]] for item in common], dtype=float)
            for result, position in zip(results, positions, strict=True)
        ]
        if metric == BITS_METRIC:  # Pairs of log-likelihood in nats and bytes.
            bits = np.stack([-row[:, 0] / math.log(2) for row in rows])
            items[name] = ItemValues(metric, bits, rows[0][:, 1])
        else:
            items[name] = ItemValues(metric, np.stack(rows), np.ones(len(common)))
    if not items:
        return None
    model_of_run = np.repeat(np.arange(len(num_seeds)), num_seeds)
    seed_weights = draw_seed_weights(model_of_run, num_resamples, np.random.default_rng(seed))
    scores = {}
    for task, values in items.items():
        # A seed for each task: adding a task does not change another one's draws.
        counts = draw_item_counts(len(values.weights), num_resamples, (seed, *task.encode()))
        scores[task] = resample(values, seed_weights, model_of_run, counts)
    groups = {name: members for run in runs for name, members in run.groups.items()}
    return PairedScores(evaluations, items, scores, groups, left_out)


def shared_metric(results: Sequence[TaskResult]) -> str | None:
    """Return the metric that all results have by item: an accuracy, else the bits per byte."""
    shared = set.intersection(*(set(result.values) for result in results))
    metric = accuracy_among(name for name in results[0].values if name in shared)
    return metric or (BITS_METRIC if BITS_METRIC in shared else None)


def _positions(result: TaskResult) -> dict[tuple[str, int], int]:
    """Return item -> its place; an item is a hash and the number of equal documents before it."""
    seen: Counter[str] = Counter()
    positions = {}
    for place, item in enumerate(result.items):
        positions[item, seen[item]] = place
        seen[item] += 1
    return positions


def resample(
    items: ItemValues,
    seed_weights: Floats,
    model_of_run: NDArray[np.int64],
    counts: Iterable[Floats],
) -> Scores:
    """Score every model on draws of one task's items.

    Args:
        items: The items under every run.
        seed_weights: (resamples, runs): weight of each run in a draw; see `draw_seed_weights`.
        model_of_run: (runs,): number of the model.
        counts: How often each item is drawn; see `draw_item_counts`.
    """
    num_models = int(model_of_run.max()) + 1
    is_of_model = (model_of_run[:, None] == np.arange(num_models)).astype(float)
    # Equal runs share a row; otherwise rounding in the product could make them differ.
    distinct, row_of_run = np.unique(items.values, axis=0, return_inverse=True)
    row_of_run = row_of_run.reshape(-1)
    columns = np.vstack([distinct, items.weights]).T
    sums = np.vstack([block @ columns for block in counts])
    by_run = (sums[:, :-1] / sums[:, -1:])[:, row_of_run]
    total = columns.sum(axis=0)
    measured = (total[:-1] / total[-1])[row_of_run]
    observed = (measured @ is_of_model) / is_of_model.sum(axis=0)
    return Scores(observed, (by_run * seed_weights) @ is_of_model)


def draw_item_counts(num_items: int, num_resamples: int, seed: tuple[int, ...]) -> Iterator[Floats]:
    """Yield how often each item is drawn, in blocks of (resamples, items); rows sum to `items`."""
    random = np.random.default_rng(seed)
    block_size = max(1, MAX_COUNTS_PER_BLOCK // num_items)
    for start in range(0, num_resamples, block_size):
        num_rows = min(block_size, num_resamples - start)
        drawn = random.integers(num_items, size=(num_rows, num_items))
        drawn += num_items * np.arange(num_rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=num_rows * num_items)
        yield counts.reshape(num_rows, num_items).astype(float)


def draw_seed_weights(
    model_of_run: NDArray[np.int64], num_resamples: int, rng: np.random.Generator
) -> Floats:
    """Return the weight of each run (seed) in each draw, (resamples, runs).

    The weights of one model's runs sum to one; models with as many runs have the same weights.
    """
    weights = np.empty((num_resamples, len(model_of_run)))
    drawn_of: dict[int, NDArray[np.int64]] = {}
    for model in range(int(model_of_run.max()) + 1):
        runs = np.flatnonzero(model_of_run == model)
        size = (num_resamples, len(runs))
        drawn = drawn_of.setdefault(len(runs), rng.integers(len(runs), size=size))
        for number, run in enumerate(runs):
            weights[:, run] = (drawn == number).mean(axis=1)
    return weights


def on_front(costs: Floats, goodness: Floats) -> NDArray[np.bool_]:
    """Return which models are on the front in each draw, (resamples, models).

    A model is on the front if it is better than all cheaper ones, and as good as any that costs as
    much; equal models all are.

    Args:
        costs: (models,), exact.
        goodness: (resamples, models), higher is better.
    """
    is_member = np.zeros(goodness.shape, dtype=bool)
    best_of_cheaper = np.full(len(goodness), -np.inf)
    for cost in np.unique(costs):
        models = np.flatnonzero(costs == cost)
        best = goodness[:, models].max(axis=1)
        is_best = goodness[:, models] == best[:, None]
        is_member[:, models] = is_best & (best > best_of_cheaper)[:, None]
        best_of_cheaper = np.maximum(best, best_of_cheaper)
    return is_member
