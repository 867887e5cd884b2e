"""Several seeds of one model as one result: the mean of each metric, with its standard error.

The standard error combines two parts: the spread over seeds, divided by the root of their number,
and the mean of the seeds' own errors over items, because all seeds answered the same items.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.records.evaluation import STDERR_SUFFIX, EvaluationResult
from orchestrator.records.trial import Trial, TrialCost, TrialDecoding, TrialTraining
from orchestrator.reporting.pareto import FrontPoint, find_front
from orchestrator.reporting.shown_points import MAX_SHOWN, shown_points
from orchestrator.workspace.provenance import content_key


@dataclass(frozen=True)
class SeedAverages:
    """One result for each model, and the seeds that it is the mean of."""

    results: tuple[Trial, ...]
    """In the order in which the models first appear."""
    keys_of_seeds: Mapping[str, tuple[str, ...]]
    """Key of a result -> keys of the results it is the mean of; its own key for a single seed."""

    def evaluations(
        self, items: Mapping[str, EvaluationResult]
    ) -> dict[str, Sequence[EvaluationResult]]:
        """Return the evaluations of each model's seeds; without models that lack one of them."""
        return {
            key: [items[seed] for seed in seeds]
            for key, seeds in self.keys_of_seeds.items()
            if all(seed in items for seed in seeds)
        }

    def seeds_of(self, points: Iterable[FrontPoint], results: Iterable[Trial]) -> list[Trial]:
        """Return the results that the points of a front stand for."""
        keys = {key for p in points for key in self.keys_of_seeds.get(p.result.key, ())}
        return [result for result in results if result.key in keys]


def average_seeds(results: Sequence[Trial]) -> SeedAverages:
    """Average the results of each group; a result without other seeds stays as it is."""
    groups: dict[str, list[Trial]] = {}
    for result in results:
        name = f"{result.role} {result.group}" if result.group else result.key
        groups.setdefault(name, []).append(result)
    keys_of_seeds, averages = {}, []
    for group in groups.values():
        averages.append(_average(group) if len(group) > 1 else group[0])
        keys_of_seeds[averages[-1].key] = tuple(result.key for result in group)
    return SeedAverages(tuple(averages), keys_of_seeds)


def shown_results(results: Sequence[Trial]) -> list[Trial]:
    """Return the results, or of many the seeds of those models that tables show."""
    if len(results) <= MAX_SHOWN:
        return list(results)
    averages = average_seeds(results)
    return averages.seeds_of(shown_points(find_front(averages.results)), results)


def lowest_seed(group: Sequence[Trial]) -> Trial:
    """Return the seed whose weights stand for the model; the best seed would flatter it."""
    return min(group, key=lambda result: result.seed or 0)


def _average(group: Sequence[Trial]) -> Trial:
    first = lowest_seed(group)
    train = _means([result.train.numbers() for result in group])
    return first.model_copy(
        update={
            "key": content_key("seeds", *sorted(result.key for result in group)),
            "label": first.group or first.label,
            "quality": _average_quality([result.quality for result in group]),
            "cost": TrialCost(**_means([result.cost.numbers() for result in group])),
            "train": TrialTraining(**train, seeds=len(group)),
            "decoding": TrialDecoding(**_means([result.decoding.numbers() for result in group])),
            "seed": None,
            "group": None,
        }
    )


def _average_quality(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    means = _means(seeds)
    quality = {}
    for name in (name for name in means if not name.endswith(STDERR_SUFFIX)):
        quality[name] = means[name]
        values = [seed[name] for seed in seeds]
        variance = math.fsum((v - means[name]) ** 2 for v in values) / (len(values) - 1)
        over_items = means.get(name + STDERR_SUFFIX, 0.0) ** 2
        quality[name + STDERR_SUFFIX] = math.sqrt(variance / len(values) + over_items)
    return quality


def _means(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric that all seeds have."""
    names = [name for name in seeds[0] if all(name in seed for seed in seeds)]
    return {name: math.fsum(seed[name] for seed in seeds) / len(seeds) for name in names}
