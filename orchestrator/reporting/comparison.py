"""How much models differ that were evaluated together.

Models mostly err on the same items, so a difference over the items that all of them answered is
known far better than either score. Intervals are those of `statistics`, as on a front; each is of
one comparison by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.records.evaluation import BITS_METRIC, EvaluationResult
from orchestrator.records.metrics import quality_name
from orchestrator.reporting.statistics import Interval, Scores, pair_scores

AVERAGE = "average"
"""Stands for a task where a score is the mean over the tasks."""
AVERAGED_METRICS = ("accuracy", BITS_METRIC)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What a model scores more than the first one, over the same items."""

    model: str
    against: str
    """The first model."""
    task: str
    """Name of the task, or `AVERAGE`."""
    metric: str
    num_items: int
    """Items that all models answered."""
    interval: Interval


def differences_from_first(evaluations: Mapping[str, EvaluationResult]) -> list[Difference]:
    """Return the differences of each model to the first one, by task, then of the averages.

    Of each task, the metric is its accuracy, or the bits per byte of a task without one. Tasks
    without an item that all models answered have no differences.

    Args:
        evaluations: Name of a model -> its evaluation.
    """
    paired = None
    if len(evaluations) > 1:
        paired = pair_scores({name: [evaluation] for name, evaluation in evaluations.items()})
    if paired is None:
        return []
    measured: list[tuple[str, str, int, Scores]] = []
    for task, items in paired.items.items():
        measured.append((task, items.metric, len(items.weights), paired.scores[task]))
    for metric in AVERAGED_METRICS:
        quality = quality_name(metric)
        scores = paired.quality(quality)
        if scores is not None:
            measured.append((AVERAGE, metric, paired.num_items(quality), scores))
    first, *later_models = evaluations
    return [
        Difference(
            model=model,
            against=first,
            task=task,
            metric=metric,
            num_items=num_items,
            interval=scores.difference(number, 0).interval(),
        )
        for task, metric, num_items, scores in measured
        for number, model in enumerate(later_models, start=1)
    ]
