"""How sure a mean or a difference is: over the items of one seed, or over seeds and items.

Two models mostly err on the same items, so their difference is known far better than either score.
Items are matched by hash, task by task, over all models at once; items that only some models have
are left out and counted. Models of as many seeds are compared seed by seed: those of one seed read
the same batches, and a student comes from its seed's teacher.

The error of a mean or a difference has two parts. What differs between the means of the seeds is
the seeds' part. What the items have in common in all seeds, and so would be other with other items,
is the items' part: the variance of the items' means over the seeds, less that of the rest that
differs from seed to seed, which the seeds' part has already.

**An interval is the longer one of two of Student's t**: over the seeds alone, with as many degrees
of freedom as there are seeds, less one; and over both parts, with Satterthwaite's degrees of
freedom (Biometrics Bulletin 2, 1946). The choice is by simulation (`research/coverage.md`), of the
share of 95% intervals that hold the truth, over all ratios of the items' part to the seeds':

| seeds | 2 | 3 | 5 | 10 |
| --- | --- | --- | --- | --- |
| this interval | 94.4 to 96.5% | 94.9 to 95.5% | 94.3 to 95.0% | 94.8 to 95.0% |
| Satterthwaite's alone | 87 to 95% | 92 to 95% | 94 to 95% | 95% |
| the seeds alone | 50 to 95% | 25 to 95% | 20 to 95% | 15 to 95% |

Two seeds do not say how large their part is, and the interval over them alone is often the longer
one where the items' part is the larger. So of theirs, some of the items' part is taken off
(`ITEMS_SHARE_OF_TWO_SEEDS`); without that, up to 97.7% hold the truth. Draws of the seeds with
replacement, as in a percentile bootstrap, held the truth in 62 to 92%: they know neither n - 1 nor
Student's t.

With one seed an interval is over its items alone, and says so: nothing is known of other trainings.

Few items that differ have another right answer under another draw of items, although none of those
at hand says so: where two models agree on all items, their difference is not known exactly. So an
accuracy counts one item more that the model alone answers otherwise, in its variance (Bonett and
Price, 2012, for pairs), and `Scores.confidence_keeps` one more that is lost.

**Of several models** one is the best by luck. Confidences of several are corrected by Holm's
method (`corrected`), and the interval of one that was chosen for its score is that of as many
comparisons (Bonferroni). Halves of the items, one to choose and one to judge, would not do: both
have the luck of the same seeds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

# Student's t as `scipy.stats.t` has it, whose module takes seconds to import.
from scipy.special import ndtri, stdtr, stdtrit

from orchestrator.records.evaluation import (
    BITS_METRIC,
    EvaluationResult,
    TaskResult,
    accuracy_among,
)
from orchestrator.records.metrics import (
    CONFIDENCE_KEEPS_99,
    CONFIDENCE_ON_FRONT,
    PAIRED_SHARE_OF_FULL,
    QUALITY,
)

INTERVAL_LEVEL = 0.95
"""Share of intervals that hold the truth."""
POWER = 0.8
"""Share of sweeps that would show a difference of the size that they are said to tell apart."""
EXPECTED_SHARE_DIFFERING = 0.06
"""Share of the items on which two models of a sweep are assumed to differ until it is measured."""
ITEMS_SHARE_OF_TWO_SEEDS = 0.06
"""Share of the items' variance that the interval over two seeds alone leaves out."""
DEMANDED_SHARE = 0.99
"""A model keeps the full model's quality if it reaches this share of it, unless a user demands
another one."""
SUMMARY_METRICS = (PAIRED_SHARE_OF_FULL, CONFIDENCE_KEEPS_99, CONFIDENCE_ON_FRONT)
"""Numbers that a model's run has as metrics; its differences to others are rows of a table."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A number, and the range that holds the truth in 95% of such measurements."""

    value: float
    low: float
    high: float
    over: str = ""
    """What was sampled: `items of one seed`, `seeds` or `seeds and items`."""

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the range lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference over seeds and items, and the two parts of its error."""

    value: float
    seeds_variance: float = 0.0
    """Of the mean over the seeds."""
    seeds_freedom: float = 0.0
    """Degrees of freedom of this variance; 0 where each model has one seed."""
    items_variance: float = 0.0
    """What the items add to it."""
    items_freedom: float = 0.0
    """Degrees of freedom; 0 where values of single items are not known."""

    @property
    def error(self) -> float:
        """The standard error."""
        return math.sqrt(self.seeds_variance + self.items_variance)

    @property
    def over(self) -> str:
        """What was sampled, as `Interval.over` says it."""
        if not self.seeds_freedom:
            return "items of one seed"
        return "seeds and items" if self.items_freedom else "seeds"

    def _errors(self) -> list[tuple[float, float]]:
        """Return the standard errors of the intervals of which the longest counts, each with its
        degrees of freedom."""
        if not self.seeds_freedom:
            return [(self.error, self.items_freedom)]
        variance_alone = self.seeds_variance
        if self.seeds_freedom == 1:
            variance_alone -= ITEMS_SHARE_OF_TWO_SEEDS * self.items_variance
        seeds_alone = (math.sqrt(max(variance_alone, 0.0)), self.seeds_freedom)
        if not self.items_variance:
            return [seeds_alone]
        variance = self.seeds_variance + self.items_variance
        doubt = self.seeds_variance**2 / self.seeds_freedom
        doubt += self.items_variance**2 / self.items_freedom
        return [seeds_alone, (self.error, variance**2 / doubt)]

    def half_width(self, level: float = INTERVAL_LEVEL) -> float:
        """Return half of the length of the interval that holds the truth in so many cases."""
        return max(e * float(stdtrit(freedom, (1 + level) / 2)) for e, freedom in self._errors())

    def interval(self, *, num_comparisons: int = 1) -> Interval:
        """Return the 95% interval.

        Args:
            num_comparisons: Estimates among which this one was chosen: then the intervals of all
                hold the truth at once in 95% of cases.
        """
        reach = self.half_width(1 - (1 - INTERVAL_LEVEL) / num_comparisons)
        return Interval(self.value, self.value - reach, self.value + reach, self.over)

    def confidence_above(self, bound: float = 0.0) -> float:
        """Return how sure it is that the truth is above a bound: 0.975 where the bound is the lower
        end of the 95% interval."""
        distance = self.value - bound
        if not distance:
            return 0.5
        doubt = 0.0
        for error, freedom in self._errors():
            if error:
                doubt = max(doubt, float(stdtr(freedom, -abs(distance) / error)))
        return 1 - doubt if distance > 0 else doubt

    @property
    def resolvable(self) -> float:
        """The smallest difference of which 80% of such estimates have an interval without zero."""
        return self.half_width() + self.half_width(2 * POWER - 1)


def resolvable_difference(num_items: int, share_differing: float) -> float:
    """Return the difference of two accuracies that one seed's items show in 80% of cases.

    Args:
        num_items: Items that both models answer.
        share_differing: Share of the items that only one of both answers rightly.
    """
    quantiles = ndtri((1 + INTERVAL_LEVEL) / 2) + ndtri(POWER)
    return float(quantiles) * math.sqrt(share_differing / num_items)


def sum_of_means(groups: Sequence[Sequence[float] | Floats]) -> Estimate:
    """Return the sum of the means of several groups of seeds, which were trained independently.

    The variance of a mean of n seeds is the sum of squares over n - 1, over n. A single seed among
    groups of several is taken to vary as much as they do.
    """
    value = sum(float(np.mean(group)) for group in groups)
    several = [group for group in groups if len(group) > 1]
    num_single = len(groups) - len(several)
    variance = 0.0
    doubt = 0.0
    for group in several:
        weight = 1 / len(group) + num_single / len(several)
        part = weight * float(np.var(group, ddof=1))
        variance += part
        doubt += part**2 / (len(group) - 1)
    if not several:
        return Estimate(value)
    freedom = variance**2 / doubt if doubt else min(len(group) for group in several) - 1.0
    return Estimate(value, variance, freedom)


def corrected(confidences: Mapping[str, float]) -> dict[str, float]:
    """Return confidences in several claims at once, by Holm's method (Scandinavian Journal of
    Statistics 6, 1979): one false claim of a confidence of 0.95 or more stands among them in at
    most 5% of cases."""
    surest_first = sorted(confidences, key=lambda key: -confidences[key])
    corrected_doubt = 0.0
    result = {}
    for number, key in enumerate(surest_first):
        doubt = (len(surest_first) - number) * (1 - confidences[key])
        corrected_doubt = min(1.0, max(corrected_doubt, doubt))
        result[key] = 1 - corrected_doubt
    return result


@dataclass(frozen=True)
class Scores:
    """One quality of every model."""

    by_seed: Sequence[Floats]
    """Number of a model -> (seeds,): its scores."""
    effects: Sequence[Floats]
    """Number of a model -> (seeds, items): what each item adds to a score, more than the average.
    The sum of their squares is the score's variance over draws of the items."""
    items_freedom: float
    """Degrees of freedom of this variance: those of the smallest task."""
    item_shares: tuple[float, ...] = ()
    """What one item adds to an accuracy, for each task; empty for another metric."""

    @property
    def observed(self) -> Floats:
        """(models,): the means over the seeds."""
        return np.array([scores.mean() for scores in self.by_seed])

    def score(self, model: int) -> Estimate:
        """Return a model's score."""
        return self.weighted({model: 1.0})

    def difference(self, model: int, other: int, *, share: float = 1.0) -> Estimate:
        """Return a model's score minus another one's, or minus a share of it."""
        if model == other:
            return self.weighted({model: 1.0 - share})
        return self.weighted({model: 1.0, other: -share})

    def weighted(self, weights: Mapping[int, float]) -> Estimate:
        """Return the sum of some models' scores times their weights."""
        scores = [weight * self.by_seed[model] for model, weight in weights.items()]
        effects = [weight * self.effects[model] for model, weight in weights.items()]
        if len({len(of_model) for of_model in scores}) == 1:
            # The same seeds: what they do to all models cancels.
            scores = [np.sum(scores, axis=0)]
            effects = [np.sum(effects, axis=0)]
        over_seeds = sum_of_means(scores)
        means = [of_seeds.mean(axis=0) for of_seeds in effects]
        items_variance = float((np.sum(means, axis=0) ** 2).sum())
        for of_seeds, mean in zip(effects, means, strict=True):
            num_seeds = len(of_seeds)
            if num_seeds > 1:  # This differs between the seeds, whose variance has it already.
                rest = float(((of_seeds - mean) ** 2).sum())
                items_variance -= rest / (num_seeds * (num_seeds - 1))
        squares = sum(weight**2 for weight in weights.values())
        one_item_more = squares * sum(share**2 for share in self.item_shares)
        return replace(
            over_seeds,
            items_variance=max(items_variance, 0.0) + one_item_more,
            items_freedom=self.items_freedom,
        )

    def share(self, part: int, whole: int, *, num_comparisons: int = 1) -> Interval | None:
        """Return a model's score as a share of another one's, by the delta method; None if that is
        zero. `num_comparisons` is that of `Estimate.interval`."""
        divisor = self.by_seed[whole].mean()
        if divisor <= 0:
            return None
        ratio = float(self.by_seed[part].mean() / divisor)
        difference = self.difference(part, whole, share=ratio)
        interval = difference.interval(num_comparisons=num_comparisons)
        low = ratio + interval.low / divisor
        high = ratio + interval.high / divisor
        return Interval(ratio, float(low), float(high), interval.over)

    def confidence_keeps(self, part: int, whole: int, demanded_share: float) -> float:
        """Return how sure it is that a model keeps a share of another one's score.

        The items at hand say little of how rare those are that the model alone loses: where none
        does, none can tell. So one item more is counted as lost. Of models that keep exactly 99%
        of an accuracy, at most 6% have a confidence of 0.95 (`research/coverage.md`).
        """
        if part == whole:
            return float(demanded_share <= 1)
        kept = self.difference(part, whole, share=demanded_share)
        return kept.confidence_above(demanded_share * max(self.item_shares, default=0.0))


def mean_scores(tasks: Sequence[Scores]) -> Scores:
    """Return the unweighted mean over several tasks."""
    assert tasks, "a mean needs at least one task"
    num_tasks = len(tasks)
    models = range(len(tasks[0].by_seed))
    return Scores(
        by_seed=[np.mean([task.by_seed[model] for task in tasks], axis=0) for model in models],
        effects=[
            np.concatenate([task.effects[model] / num_tasks for task in tasks], axis=1)
            for model in models
        ],
        items_freedom=min(task.items_freedom for task in tasks),
        item_shares=tuple(share / num_tasks for task in tasks for share in task.item_shares),
    )


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

    def scores(self, num_seeds: Sequence[int]) -> Scores:
        """Return the scores of all models.

        Args:
            num_seeds: Number of a model -> how many of the runs are its seeds; they are in order.
        """
        num_items = len(self.weights)
        total = self.weights.sum()
        by_run = self.values.sum(axis=1) / total
        # For a ratio of sums this is the delta method.
        effects = (self.values - by_run[:, None] * self.weights) / total
        freedom = max(num_items - 1, 1)
        effects *= math.sqrt(num_items / freedom)
        ends = np.cumsum(num_seeds)[:-1]
        item_shares = () if self.metric == BITS_METRIC else (1 / num_items,)
        return Scores(np.split(by_run, ends), np.split(effects, ends), freedom, item_shares)


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
    def unaveraged(self) -> set[str]:
        """The tasks that are in no average."""
        runs = (run for seeds in self.evaluations.values() for run in seeds)
        return {name for run in runs for name in run.unaveraged}

    @property
    def number_of(self) -> dict[str, int]:
        """Key of a model -> its number in the scores."""
        return {key: number for number, key in enumerate(self.evaluations)}

    def num_items(self, quality: str) -> int:
        """Return the number of the items that a quality is computed from."""
        tasks = [task for term in self._terms(quality) for task in term]
        return sum(len(self.items[task].weights) for task in tasks)

    def share_differing(self, quality: str, key: str, other_key: str) -> float:
        """Return the share of a quality's items on which the first seeds of two models differ."""
        first_run = 0
        runs = {}
        for model, seeds in self.evaluations.items():
            runs[model] = first_run
            first_run += len(seeds)
        tasks = [self.items[task].values for term in self._terms(quality) for task in term]
        num_differing = sum(
            int(np.sum(values[runs[key]] != values[runs[other_key]])) for values in tasks
        )
        return num_differing / self.num_items(quality)

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
        averaged = [task for task in metrics if task not in self.unaveraged]
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


def pair_scores(evaluations: Mapping[str, Sequence[EvaluationResult]]) -> PairedScores | None:
    """Score all models on the items that all of them answered; None if there is no such item.

    Args:
        evaluations: Key of a model -> its evaluations, one for each seed.
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
    scores = {task: values.scores(num_seeds) for task, values in items.items()}
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
