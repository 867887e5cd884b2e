"""Paired comparison of models: match their stored evaluations item by item, then bootstrap.

Two models mostly err on the same items, so their difference is known far better than either score.
Items are matched by hash, task by task, over all models at once; items that only some models have
are left out and counted. A task's score is the mean of its accuracy metric, or its bits per byte.
The average over tasks is that of `EvaluationResult.accuracy`, where a group counts as one task.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.records.evaluation import (
    BITS_METRIC,
    EvaluationResult,
    TaskResult,
    accuracy_among,
)
from orchestrator.reporting.bootstrap import (
    NUM_RESAMPLES,
    ItemValues,
    Scores,
    draw_seed_weights,
    mean_scores,
    resample,
)

Item = tuple[str, int]
"""Hash of a document, and the number of equal documents before it."""


@dataclass(frozen=True)
class MatchedItems:
    """The items that all models answered."""

    model_of_run: NDArray[np.int64]
    """(runs,): number of the model, in the order in which the evaluations were given."""
    tasks: Mapping[str, ItemValues]
    metrics: Mapping[str, str]
    """Task -> the metric that is compared."""
    groups: Mapping[str, tuple[str, ...]]
    """Group that counts as one task in the average -> its tasks."""
    left_out: Mapping[str, int]
    """Task -> number of items that only some of the models answered."""

    @property
    def num_left_out(self) -> int:
        """Items of all tasks that only some of the models answered."""
        return sum(self.left_out.values())

    @property
    def num_items(self) -> int:
        """Items of all tasks together."""
        return sum(len(task.weights) for task in self.tasks.values())


@dataclass(frozen=True)
class ResampledScores:
    """Scores of all models on every task."""

    matched: MatchedItems
    tasks: Mapping[str, Scores]

    def quality(self, name: str) -> Scores | None:
        """Return the scores of a tracked quality; None if it has no values by item.

        Args:
            name: `quality/accuracy`, `quality/bits_per_byte`, or a task's compared metric as
                `quality/TASK/METRIC`.
        """
        metrics = self.matched.metrics
        key = name.removeprefix("quality/")
        if key == "accuracy":
            return self._mean_accuracy()
        if key == BITS_METRIC:
            tasks = [s for task, s in self.tasks.items() if metrics[task] == BITS_METRIC]
            return mean_scores(tasks) if tasks else None
        task, _, metric = key.rpartition("/")
        return self.tasks[task] if metrics.get(task) == metric else None

    def _mean_accuracy(self) -> Scores | None:
        metrics, groups = self.matched.metrics, self.matched.groups
        tasks = [task for task in self.tasks if metrics[task] != BITS_METRIC]
        grouped = {task for members in groups.values() for task in members}
        units: list[Iterable[str]] = [[task] for task in tasks if task not in grouped]
        units += groups.values()
        scores = [[self.tasks[task] for task in unit if task in tasks] for unit in units]
        means = [mean_scores(unit) for unit in scores if unit]
        return mean_scores(means) if means else None


def match_items(evaluations: Mapping[str, Sequence[EvaluationResult]]) -> MatchedItems | None:
    """Find the items that all models answered; None if there is no such item.

    Args:
        evaluations: Key of a model -> its evaluations, one for each seed.
    """
    runs = [run for seeds in evaluations.values() for run in seeds]
    num_seeds = [len(seeds) for seeds in evaluations.values() if seeds]
    tasks, metrics, left_out = {}, {}, {}
    for name in dict.fromkeys(name for run in runs for name in run.results):
        results = [run.results[name] for run in runs if name in run.results]
        left_out[name] = len({item for result in results for item in _items(result)})
        metric = shared_metric(results)
        values = _item_values(results, metric) if metric and len(results) == len(runs) else None
        if metric and values is not None:
            tasks[name], metrics[name] = values, metric
            left_out[name] -= len(values.weights)
    if not tasks:
        return None
    groups = {name: members for run in runs for name, members in run.groups.items()}
    model_of_run = np.repeat(np.arange(len(num_seeds)), num_seeds)
    return MatchedItems(model_of_run, tasks, metrics, groups, left_out)


def resample_scores(
    matched: MatchedItems, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> ResampledScores:
    """Score all models on draws of the items; the same seed gives the same draws."""
    rng = np.random.default_rng(seed)
    seed_weights = draw_seed_weights(matched.model_of_run, num_resamples, rng)
    # A generator for each task: adding a task does not change another one's draws.
    rngs = {task: np.random.default_rng([seed, *task.encode()]) for task in matched.tasks}
    scores = {
        task: resample(items, seed_weights, matched.model_of_run, rngs[task])
        for task, items in matched.tasks.items()
    }
    return ResampledScores(matched, scores)


def _items(result: TaskResult) -> list[Item]:
    seen: Counter[str] = Counter()
    items = []
    for item in result.items:
        items.append((item, seen[item]))
        seen[item] += 1
    return items


def shared_metric(results: Sequence[TaskResult]) -> str | None:
    """Return the metric that all results have by item: an accuracy, else the bits per byte."""
    shared = set.intersection(*(set(result.values) for result in results))
    metric = accuracy_among(name for name in results[0].values if name in shared)
    return metric or (BITS_METRIC if BITS_METRIC in shared else None)


def _item_values(results: Sequence[TaskResult], metric: str) -> ItemValues | None:
    positions = [{item: number for number, item in enumerate(_items(result))} for result in results]
    common = [item for item in positions[0] if all(item in other for other in positions)]
    if not common:
        return None
    rows = [
        np.asarray([result.values[metric][position[item]] for item in common], dtype=float)
        for result, position in zip(results, positions, strict=True)
    ]
    if metric == BITS_METRIC:
        # Pairs of log-likelihood in nats and bytes.
        return ItemValues(np.stack([-row[:, 0] / math.log(2) for row in rows]), rows[0][:, 1])
    return ItemValues(np.stack(rows), np.ones(len(common)))
