"""What other items, and other seeds, could have shown: resampling in plain arrays.

In go values of several models over the same items. Out come draws: what every model would have
scored had the items been drawn again, with replacement and as many. All models get the same draw,
so that what the items have in common cancels in differences and ratios; each task is drawn by
itself. Where a model was trained with several seeds, each draw takes as many of its seeds, with
replacement, before it takes items.

A draw is a count for each item, and a score is a ratio of sums, so a matrix product scores all
models at once: 10,000 draws of 1,400 items under 12 models take half a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 10_000
INTERVAL_LEVEL = 0.95
"""Share of the draws that an interval holds; the rest lies outside in equal parts."""
MAX_COUNTS_PER_BLOCK = 2_000_000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A number, and the range that holds most of its draws."""

    value: float
    """As it was measured."""
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
    """(items,): what it adds to the number the score is divided by: 1 for a mean, bytes for bits
    per byte."""


@dataclass(frozen=True)
class Scores:
    """One quality of every model, as measured and as drawn again."""

    observed: Floats
    """(models,)"""
    drawn: Floats
    """(resamples, models)"""

    def interval(self, model: int) -> Interval:
        """Return a model's score with its interval."""
        return interval_of(self.observed[model], self.drawn[:, model])

    def difference(self, model: int, rival: int) -> Interval:
        """Return a model's score minus its rival's over the same draws."""
        return interval_of(
            self.observed[model] - self.observed[rival],
            self.drawn[:, model] - self.drawn[:, rival],
        )

    def ratio(self, model: int, rival: int) -> tuple[Interval, Floats] | None:
        """Return a model's score over its rival's with the interval, and all its draws.

        Returns:
            None if the rival has a draw without any score, as a few items under a weak model do.
        """
        if min(self.observed[rival], self.drawn[:, rival].min()) <= 0:
            return None
        drawn = self.drawn[:, model] / self.drawn[:, rival]
        return interval_of(self.observed[model] / self.observed[rival], drawn), drawn


def interval_of(value: float, drawn: Floats, *, level: float = INTERVAL_LEVEL) -> Interval:
    """Return a number with the percentile interval of its draws."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def mean_scores(parts: Sequence[Scores]) -> Scores:
    """Return the plain mean of several qualities, as of tasks."""
    assert parts, "a mean needs at least one part"
    observed = sum(part.observed for part in parts) / len(parts)
    drawn = sum(part.drawn for part in parts) / len(parts)
    return Scores(np.asarray(observed), np.asarray(drawn))


def resample(
    sample: ItemValues, seed_weights: Floats, owners: NDArray[np.int64], rng: np.random.Generator
) -> Scores:
    """Score every model on draws of one task's items.

    Args:
        sample: The items under every run.
        seed_weights: (resamples, runs): weight of each run in a draw; see `draw_seed_weights`.
        owners: (runs,): which model each run belongs to.
        rng: Draws the items.
    """
    num_resamples, num_models = len(seed_weights), int(owners.max()) + 1
    of_model = (owners[:, None] == np.arange(num_models)).astype(float)
    # Equal runs share a row: rounding in the product could otherwise tell them apart.
    distinct, row_of = np.unique(sample.values, axis=0, return_inverse=True)
    row_of = row_of.reshape(-1)
    columns = np.vstack([distinct, sample.weights]).T
    sums = np.vstack(
        [counts @ columns for counts in draw_item_counts(len(sample.weights), num_resamples, rng)]
    )
    by_run = (sums[:, :-1] / sums[:, -1:])[:, row_of]
    whole = columns.sum(axis=0)
    measured = (whole[:-1] / whole[-1])[row_of]
    return Scores((measured @ of_model) / of_model.sum(axis=0), (by_run * seed_weights) @ of_model)


def draw_item_counts(
    num_items: int, num_resamples: int, rng: np.random.Generator
) -> Iterator[Floats]:
    """Yield how often each item is drawn, in blocks of (resamples, items); rows sum to `items`."""
    at_once = max(1, MAX_COUNTS_PER_BLOCK // num_items)
    for start in range(0, num_resamples, at_once):
        rows = min(at_once, num_resamples - start)
        drawn = rng.integers(num_items, size=(rows, num_items))
        drawn += num_items * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * num_items)
        yield counts.reshape(rows, num_items).astype(float)


def draw_seed_weights(
    owners: NDArray[np.int64], num_resamples: int, rng: np.random.Generator
) -> Floats:
    """Return how much each run counts in each draw, (resamples, runs); a model's sum to one.

    Args:
        owners: (runs,): which model each run belongs to; runs of one model are its seeds.
        num_resamples: Draws.
        rng: Draws the seeds.
    """
    weights = np.empty((num_resamples, len(owners)))
    for model in range(int(owners.max()) + 1):
        runs = np.flatnonzero(owners == model)
        chosen = rng.integers(len(runs), size=(num_resamples, len(runs)))
        for number, run in enumerate(runs):
            weights[:, run] = (chosen == number).mean(axis=1)
    return weights


def front_shares(costs: Floats, goodness: Floats) -> Floats:
    """Return in which share of the draws each model is on the front.

    Args:
        costs: (models,), exact.
        goodness: (resamples, models), more is better.
    """
    shares = np.zeros(len(costs))
    best_of_cheaper = np.full(len(goodness), -np.inf)
    for cost in np.unique(costs):
        level = np.flatnonzero(costs == cost)
        best = goodness[:, level].max(axis=1)
        wins = best > best_of_cheaper
        for model in level:
            shares[model] = (wins & (goodness[:, model] == best)).mean()
        best_of_cheaper = np.maximum(best, best_of_cheaper)
    return shares
