"""Several seeds of one model as one result: the mean of each number, and how sure it is.

In: the results of a sweep, those of one group being seeds of one model. Out: one result for each
group, and which results it stands for, so that paired comparisons can draw seeds before they draw
items. A number's standard error joins two things: what other seeds would have given (the spread
over seeds, divided by the root of their number) and what other items would have (the mean of the
seeds' own errors, because all of them answered the same items).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.records.evaluation import STDERR_SUFFIX, EvaluationResult
from orchestrator.records.trial import TrialResult
from orchestrator.workspace.provenance import content_key


@dataclass(frozen=True)
class SeedAverages:
    """Results, one for each model, and the seeds behind each."""

    results: tuple[TrialResult, ...]
    """In the order in which the models were first met."""
    keys_of_seeds: Mapping[str, tuple[str, ...]]
    """Key of a result -> keys of the results that it stands for; its own where it is alone."""

    def evaluations(
        self, items: Mapping[str, EvaluationResult]
    ) -> dict[str, Sequence[EvaluationResult]]:
        """Return what each model's seeds were measured by; models that lack one stay out."""
        return {
            key: [items[member] for member in keys_of_seeds]
            for key, keys_of_seeds in self.keys_of_seeds.items()
            if all(member in items for member in keys_of_seeds)
        }


def average_seeds(results: Sequence[TrialResult]) -> SeedAverages:
    """Join the results of each group; results without a group, or alone in it, stay as they are."""
    groups: dict[str, list[TrialResult]] = {}
    for result in results:
        name = f"{result.role} {result.group}" if result.group else result.key
        groups.setdefault(name, []).append(result)
    joined = {}
    for group in groups.values():
        one = _join(group) if len(group) > 1 else group[0]
        joined[one.key] = (one, tuple(result.key for result in group))
    return SeedAverages(
        tuple(one for one, _ in joined.values()),
        {key: keys_of_seeds for key, (_, keys_of_seeds) in joined.items()},
    )


def lowest_seed(group: Sequence[TrialResult]) -> TrialResult:
    """Return the seed whose weights and run stand for a model; the best one would flatter it."""
    return min(group, key=lambda result: result.seed or 0)


def _join(group: Sequence[TrialResult]) -> TrialResult:
    first = lowest_seed(group)
    return replace(
        first,
        key=content_key("seeds", *sorted(result.key for result in group)),
        label=first.group or first.label,
        quality=_quality([result.quality for result in group]),
        cost=_means([result.cost for result in group]),
        train=_means([result.train for result in group]) | {"seeds": float(len(group))},
        seed=None,
        group=None,
    )


def _quality(numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    means = _means(numbers)
    found = {}
    for name in (name for name in means if not name.endswith(STDERR_SUFFIX)):
        found[name] = means[name]
        values = [each[name] for each in numbers]
        over_seeds = math.fsum((v - means[name]) ** 2 for v in values) / (len(values) - 1)
        over_items = means.get(name + STDERR_SUFFIX, 0.0) ** 2
        found[name + STDERR_SUFFIX] = math.sqrt(over_seeds / len(values) + over_items)
    return found


def _means(numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each number that all have."""
    names = [name for name in numbers[0] if all(name in each for each in numbers)]
    return {name: math.fsum(each[name] for each in numbers) / len(numbers) for name in names}
