"""Two evaluations on the same items: scores, paired differences, intervals, McNemar's test.

Differences are the second model minus the first. Tasks of different versions, and tasks without a
metric or an item in common, are left out with the reason. The average over accuracies is that of
`EvaluationResult.accuracy`; its test counts the items of all its tasks together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from orchestrator.records.evaluation import BITS_METRIC, EvaluationResult, TaskResult
from orchestrator.reporting.bootstrap import NUM_RESAMPLES, Interval, Scores
from orchestrator.reporting.mcnemar import McNemar, count_discordant
from orchestrator.reporting.paired_bootstrap import (
    MatchedItems,
    match_items,
    resample_scores,
    shared_metric,
)
from orchestrator.terminal.render import format_count
from orchestrator.workspace.errors import UserError

AVERAGE = "average"


@dataclass(frozen=True, kw_only=True)
class ComparedScore:
    """One score of two models on the items that both answered."""

    task: str
    """Name of the task, or `AVERAGE`."""
    metric: str
    first: float
    second: float
    difference: Interval
    """The second minus the first, with its 95 % interval."""
    num_items: int
    """Items that both models answered."""
    num_left_out: int
    """Items that only one of them answered."""
    mcnemar: McNemar | None
    """Of accuracies whose items are right or wrong."""

    @property
    def is_accuracy(self) -> bool:
        """Whether it is a share of right items; bits per byte otherwise."""
        return self.metric != BITS_METRIC


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same items."""

    names: tuple[str, str]
    tasks: tuple[ComparedScore, ...]
    averages: tuple[ComparedScore, ...]
    """Of the accuracies and of the bits per byte, where there are several."""
    notes: tuple[str, ...]
    """What is not compared, and what else differs between the two evaluations."""

    @property
    def overall(self) -> tuple[ComparedScore, ...]:
        """The averages; the task itself where there is only one of its kind."""
        averaged = {row.is_accuracy for row in self.averages}
        return (*self.averages, *(row for row in self.tasks if row.is_accuracy not in averaged))


def compare_evaluations(
    first: EvaluationResult,
    second: EvaluationResult,
    names: tuple[str, str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two evaluations, item by item.

    Args:
        names: What to call the two models.
        num_resamples: Number of draws of the items for the intervals.
        seed: Random seed of the draws.

    Raises:
        UserError: If no task can be compared; says why for each of them.
    """
    notes = _notes_on_missing(first, second, names)
    shared = []
    for name in (name for name in first.results if name in second.results):
        pair = first.results[name], second.results[name]
        if reason := _reason_against(*pair, names):
            notes.append(f"{name} is not compared: {reason}")
            continue
        shared.append(name)
        if note := _note_on_prompts(*pair, names):
            notes.append(note)
    matched = match_items({"first": [_only(first, shared)], "second": [_only(second, shared)]})
    if matched is None:
        raise UserError(f"nothing can be compared: {'; '.join(notes)}")
    draws = resample_scores(matched, num_resamples=num_resamples, seed=seed)
    tasks = tuple(_compared(name, matched, [name], scores) for name, scores in draws.tasks.items())
    averages = []
    for quality in ("accuracy", BITS_METRIC):
        members = [row.task for row in tasks if row.is_accuracy == (quality == "accuracy")]
        scores = draws.quality(f"quality/{quality}")
        if len(members) > 1 and scores:
            row = _compared(AVERAGE, matched, members, scores)
            averages.append(replace(row, metric=quality))
    return Comparison(names=names, tasks=tasks, averages=tuple(averages), notes=tuple(notes))


def _compared(
    name: str, matched: MatchedItems, members: Sequence[str], scores: Scores
) -> ComparedScore:
    counts = [count_discordant(matched.tasks[member].values) for member in members]
    known = [count for count in counts if count]
    is_accuracy = matched.metrics[members[0]] != BITS_METRIC
    return ComparedScore(
        task=name,
        metric=matched.metrics[members[0]],
        first=float(scores.observed[0]),
        second=float(scores.observed[1]),
        difference=scores.difference(1, 0),
        num_items=sum(len(matched.tasks[member].weights) for member in members),
        num_left_out=sum(matched.left_out[member] for member in members),
        mcnemar=reduce(add, known) if is_accuracy and len(known) == len(counts) else None,
    )


def _only(evaluation: EvaluationResult, names: Iterable[str]) -> EvaluationResult:
    results = {name: evaluation.results[name] for name in names}
    return EvaluationResult(results=results, groups=evaluation.groups)


def _notes_on_missing(
    first: EvaluationResult, second: EvaluationResult, names: tuple[str, str]
) -> list[str]:
    notes = []
    for name, own, other in ((names[0], first, second), (names[1], second, first)):
        if more := [task for task in own.results if task not in other.results]:
            notes.append(f"only {name} has {', '.join(more)}")
    return notes


def _reason_against(first: TaskResult, second: TaskResult, names: tuple[str, str]) -> str | None:
    """Return why two results of a task do not compare; None if they do."""
    if first.version != second.version:
        return (
            f"{names[0]} has version {first.version} of the task, {names[1]} has version "
            f"{second.version}"
        )
    if shared_metric([first, second]) is None:
        metrics = [", ".join(result.values) or "none" for result in (first, second)]
        return (
            "there is no accuracy or bits per byte that both have by item; "
            f"{names[0]} has {metrics[0]}, {names[1]} has {metrics[1]}"
        )
    if not set(first.items) & set(second.items):
        counts = [format_count(len(result.items), "item") for result in (first, second)]
        return f"its {counts[0]} under {names[0]} and {counts[1]} under {names[1]} all differ"
    return None


def _note_on_prompts(first: TaskResult, second: TaskResult, names: tuple[str, str]) -> str | None:
    if first.num_fewshot == second.num_fewshot:
        return None
    return (
        f"{first.name}: the prompts differ, with {first.num_fewshot} solved examples for "
        f"{names[0]} and {second.num_fewshot} for {names[1]}"
    )
