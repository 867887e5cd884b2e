"""Bootstrap of items and seeds, in plain arrays.

Each draw takes as many items as there are, with replacement, and scores all models on them, so what
the items have in common cancels in differences and ratios. Each task is drawn separately. For a
model trained with several seeds, each draw first draws its seeds. A draw is a count for each item
and a score is a ratio of sums, so one matrix product scores all models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 10_000
INTERVAL_LEVEL = 0.95
"""Share of the draws inside an interval; the rest lies outside in equal parts."""
MAX_COUNTS_PER_BLOCK = 2_000_000
"""Bounds the memory of `draw_item_counts`."""

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
class ItemValues:
    """The same items of one task under every run of every model."""

    values: Floats
    """(runs, items): what each item adds to a run's score, such as 1 for a right answer."""
    weights: Floats
    """(items,): what each item adds to the divisor: 1 for a mean, bytes for bits per byte."""


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


def resample(
    items: ItemValues,
    seed_weights: Floats,
    model_of_run: NDArray[np.int64],
    rng: np.random.Generator,
) -> Scores:
    """Score every model on draws of one task's items.

    Args:
        items: The items under every run.
        seed_weights: (resamples, runs): weight of each run in a draw; see `draw_seed_weights`.
        model_of_run: (runs,): number of the model.
        rng: Draws the items.
    """
    num_resamples, num_models = len(seed_weights), int(model_of_run.max()) + 1
    is_of_model = (model_of_run[:, None] == np.arange(num_models)).astype(float)
    # Equal runs share a row; otherwise rounding in the product could make them differ.
    distinct, row_of_run = np.unique(items.values, axis=0, return_inverse=True)
    row_of_run = row_of_run.reshape(-1)
    columns = np.vstack([distinct, items.weights]).T
    blocks = draw_item_counts(len(items.weights), num_resamples, rng)
    sums = np.vstack([counts @ columns for counts in blocks])
    by_run = (sums[:, :-1] / sums[:, -1:])[:, row_of_run]
    total = columns.sum(axis=0)
    measured = (total[:-1] / total[-1])[row_of_run]
    observed = (measured @ is_of_model) / is_of_model.sum(axis=0)
    return Scores(observed, (by_run * seed_weights) @ is_of_model)


def draw_item_counts(
    num_items: int, num_resamples: int, rng: np.random.Generator
) -> Iterator[Floats]:
    """Yield how often each item is drawn, in blocks of (resamples, items); rows sum to `items`."""
    block_size = max(1, MAX_COUNTS_PER_BLOCK // num_items)
    for start in range(0, num_resamples, block_size):
        num_rows = min(block_size, num_resamples - start)
        drawn = rng.integers(num_items, size=(num_rows, num_items))
        drawn += num_items * np.arange(num_rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=num_rows * num_items)
        yield counts.reshape(num_rows, num_items).astype(float)


def draw_seed_weights(
    model_of_run: NDArray[np.int64], num_resamples: int, rng: np.random.Generator
) -> Floats:
    """Return the weight of each run (seed) in each draw, (resamples, runs).

    The weights of one model's runs sum to one.
    """
    weights = np.empty((num_resamples, len(model_of_run)))
    for model in range(int(model_of_run.max()) + 1):
        runs = np.flatnonzero(model_of_run == model)
        drawn = rng.integers(len(runs), size=(num_resamples, len(runs)))
        for number, run in enumerate(runs):
            weights[:, run] = (drawn == number).mean(axis=1)
    return weights


def front_shares(costs: Floats, goodness: Floats) -> Floats:
    """Return the share of the draws in which each model is on the front.

    Args:
        costs: (models,), exact.
        goodness: (resamples, models), higher is better.
    """
    shares = np.zeros(len(costs))
    best_of_cheaper = np.full(len(goodness), -np.inf)
    for cost in np.unique(costs):
        models = np.flatnonzero(costs == cost)
        best = goodness[:, models].max(axis=1)
        beats_cheaper = best > best_of_cheaper
        for model in models:
            shares[model] = (beats_cheaper & (goodness[:, model] == best)).mean()
        best_of_cheaper = np.maximum(best, best_of_cheaper)
    return shares
