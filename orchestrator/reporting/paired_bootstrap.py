"""Models compared over the same items: stored evaluations matched by item, then drawn again.

Two models that answer the same items err on the same ones, mostly, so their difference is known
far better than either score. Items are matched by their hash, task by task, over all models at
once; what only some models have is left out and counted. A task's score is the mean of its
accuracy metric, or its bits per byte; the average over tasks is `EvaluationResult.accuracy`'s:
a group counts as one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.records.evaluation import (
    ACCURACY_METRICS,
    BITS_METRIC,
    EvaluationResult,
    TaskResult,
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
"""Hash of a document, and how many equal ones came before it."""


@dataclass(frozen=True)
class MatchedItems:
    """The items that all models answered."""

    models: tuple[str, ...]
    """Keys, in the order of the scores."""
    owners: NDArray[np.int64]
    """(runs,): number of the model that each run belongs to."""
    samples: Mapping[str, ItemValues]
    """By name of the task."""
    metrics: Mapping[str, str]
    """Task to the metric that is compared."""
    groups: Mapping[str, tuple[str, ...]]
    """Groups that count as one in the average, and their tasks."""
    num_left_out: int
    """Items that some of the models did not answer."""

    @property
    def num_items(self) -> int:
        """Items of all tasks together."""
        return sum(len(sample.weights) for sample in self.samples.values())


@dataclass(frozen=True)
class ResampledScores:
    """Scores of all models on every task, drawn again."""

    matched: MatchedItems
    tasks: Mapping[str, Scores]

    def quality(self, name: str) -> Scores | None:
        """Return the draws of a tracked quality; None if it has no values by item.

        Args:
            name: `quality/accuracy`, `quality/bits_per_byte`, or a task's compared metric as
                `quality/TASK/METRIC`.
        """
        key = name.removeprefix("quality/")
        if key == "accuracy":
            return self._accuracy()
        if key == BITS_METRIC:
            parts = [s for task, s in self.tasks.items() if self._is_bits(task)]
            return mean_scores(parts) if parts else None
        task, _, metric = key.rpartition("/")
        return self.tasks[task] if self.matched.metrics.get(task) == metric else None

    def _is_bits(self, task: str) -> bool:
        return self.matched.metrics[task] == BITS_METRIC

    def _accuracy(self) -> Scores | None:
        having = {task for task in self.tasks if not self._is_bits(task)}
        in_group = {task for members in self.matched.groups.values() for task in members}
        parts: list[Iterable[str]] = [[task] for task in self.tasks if task in having - in_group]
        parts += list(self.matched.groups.values())
        found = [[self.tasks[task] for task in part if task in having] for part in parts]
        means = [mean_scores(part) for part in found if part]
        return mean_scores(means) if means else None


def match_items(evaluations: Mapping[str, Sequence[EvaluationResult]]) -> MatchedItems | None:
    """Find the items that all models answered.

    Args:
        evaluations: Key of a model to its evaluations, one for each seed it was trained with.

    Returns:
        None if there is no item that all answered.
    """
    models = tuple(key for key, runs in evaluations.items() if runs)
    runs = [run for key in models for run in evaluations[key]]
    owners = np.repeat(np.arange(len(models)), [len(evaluations[key]) for key in models])
    samples, metrics, num_left_out = {}, {}, 0
    for task in dict.fromkeys(name for run in runs for name in run.results):
        found = [run.results.get(task) for run in runs]
        results = [result for result in found if result is not None]
        everywhere = {item for result in results for item in _items(result)}
        metric = _paired_metric(results)
        sample = _sample(results, metric) if metric and len(results) == len(runs) else None
        if metric and sample is not None:
            samples[task], metrics[task] = sample, metric
        num_left_out += len(everywhere) - (len(sample.weights) if sample is not None else 0)
    if not samples:
        return None
    groups = {name: members for run in runs for name, members in run.groups.items()}
    return MatchedItems(models, owners, samples, metrics, groups, num_left_out)


def resample_scores(
    matched: MatchedItems, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> ResampledScores:
    """Score all models on draws of the items; the same seed gives the same draws."""
    seed_weights = draw_seed_weights(matched.owners, num_resamples, np.random.default_rng(seed))
    return ResampledScores(
        matched,
        {
            # Each task has draws of its own, which no other task's presence changes.
            task: resample(
                sample, seed_weights, matched.owners, np.random.default_rng([seed, *task.encode()])
            )
            for task, sample in matched.samples.items()
        },
    )


def _items(result: TaskResult) -> list[Item]:
    seen: Counter[str] = Counter()
    found = []
    for item in result.items:
        found.append((item, seen[item]))
        seen[item] += 1
    return found


def _paired_metric(results: Sequence[TaskResult]) -> str | None:
    """Return the metric that all runs have by item: the accuracy, else the bits per byte."""
    known = (*ACCURACY_METRICS, BITS_METRIC)
    return next((m for m in known if all(m in result.values for result in results)), None)


def _sample(results: Sequence[TaskResult], metric: str) -> ItemValues | None:
    positions = [{item: number for number, item in enumerate(_items(result))} for result in results]
    common = [item for item in positions[0] if all(item in other for other in positions)]
    if not common:
        return None
    rows = [
        np.asarray([result.values[metric][place[item]] for item in common], dtype=float)
        for result, place in zip(results, positions, strict=True)
    ]
    if metric == BITS_METRIC:
        # Pairs of log-likelihood in nats and bytes.
        return ItemValues(np.stack([-row[:, 0] / math.log(2) for row in rows]), rows[0][:, 1])
    return ItemValues(np.stack(rows), np.ones(len(common)))
