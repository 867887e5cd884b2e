"""Two evaluations on the same items: paired differences, what they decide, and a table of them.

Differences are the second model minus the first. Tasks of different versions, and tasks without a
metric or an item in common, are left out with the reason. The average over accuracies is that of
`EvaluationResult.accuracy`; its test counts the items of all its tasks together.

An accuracy is decided if the interval of the difference excludes zero and McNemar's test agrees:
with few items that only one model gets right, bootstrap intervals are too short. Of many single
tasks some differ by chance, so their p-values are corrected for their number.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from orchestrator.records.evaluation import BITS_METRIC, EvaluationResult, TaskResult
from orchestrator.reporting.sections import Column, Table, TableRow
from orchestrator.reporting.statistics import (
    INTERVAL_LEVEL,
    NUM_RESAMPLES,
    Interval,
    adjust_by_holm,
    count_discordant,
    mcnemar_p_value,
    pair_scores,
    shared_metric,
)
from orchestrator.terminal.render import format_count
from orchestrator.workspace.errors import UserError

AVERAGE = "average"
SIGNIFICANT = 1 - INTERVAL_LEVEL
"""A p-value below it decides."""


@dataclass(frozen=True, kw_only=True)
class ComparedScore:
    """One score of two models on the items that both answered."""

    task: str
    """Name of the task, or `AVERAGE`."""
    metric: str
    first: float
    second: float
    num_items: int
    """Items that both models answered."""
    num_left_out: int
    """Items that only one of them answered."""
    difference: Interval
    """The second minus the first, with its 95 % interval."""
    only_first: int | None
    """Items that only the first gets right; None unless all are right or wrong, as are the next."""
    only_second: int | None
    """Items that only the second gets right."""
    p_value: float | None
    """Of McNemar's test."""

    @property
    def is_accuracy(self) -> bool:
        """Whether it is a share of right items; bits per byte otherwise."""
        return self.metric != BITS_METRIC

    @property
    def better(self) -> int:
        """The number of the better model, 0 or 1."""
        return int((self.difference.value > 0) == self.is_accuracy)

    def text(self, value: float, *, is_difference: bool = False) -> str:
        """Write a score, or a difference with its sign; accuracies in percent without the mark."""
        sign = "+" if is_difference else ""
        return f"{100 * value:{sign}.2f}" if self.is_accuracy else f"{value:{sign}.4f}"

    @property
    def difference_texts(self) -> list[str]:
        """The difference and the ends of its interval in words."""
        ends = (self.difference.value, self.difference.low, self.difference.high)
        return [self.text(number, is_difference=True) for number in ends]

    def to_row(self) -> dict[str, Any]:
        """Return plain values; `low` and `high` are the interval of `difference`."""
        ends = {"low": self.difference.low, "high": self.difference.high}
        return {**asdict(self), "difference": self.difference.value, **ends}


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
    notes = []
    for name, own, other in ((names[0], first, second), (names[1], second, first)):
        if more := [task for task in own.results if task not in other.results]:
            notes.append(f"only {name} has {', '.join(more)}")
    shared = []
    for task in (task for task in first.results if task in second.results):
        pair = first.results[task], second.results[task]
        if reason := _reason_against(*pair, names):
            notes.append(f"{task} is not compared: {reason}")
            continue
        shared.append(task)
        examples = [result.num_fewshot for result in pair]
        if examples[0] != examples[1]:
            notes.append(
                f"{task}: the prompts differ, with {examples[0]} solved examples for {names[0]} "
                f"and {examples[1]} for {names[1]}"
            )

    evaluations = {
        name: [EvaluationResult(results={t: run.results[t] for t in shared}, groups=run.groups)]
        for name, run in (("first", first), ("second", second))
    }
    paired = pair_scores(evaluations, num_resamples=num_resamples, seed=seed)
    if paired is None:
        raise UserError(f"nothing can be compared: {'; '.join(notes)}")
    metrics = paired.metrics
    compared = [(task, metrics[task], [task], scores) for task, scores in paired.scores.items()]
    for quality in ("accuracy", BITS_METRIC):
        members = [t for t in metrics if (metrics[t] == BITS_METRIC) == (quality == BITS_METRIC)]
        average = paired.quality(f"quality/{quality}")
        if len(members) > 1 and average:
            compared.append((AVERAGE, quality, members, average))
    rows = []
    for task, metric, members, scores in compared:
        values = np.hstack([paired.items[member].values for member in members])
        counts = None if metric == BITS_METRIC else count_discordant(values)
        row = ComparedScore(
            task=task,
            metric=metric,
            first=float(scores.observed[0]),
            second=float(scores.observed[1]),
            num_items=values.shape[1],
            num_left_out=sum(paired.left_out[member] for member in members),
            difference=scores.difference(1, 0),
            only_first=counts and counts[0],
            only_second=counts and counts[1],
            p_value=counts and mcnemar_p_value(*counts),
        )
        rows.append(row)
    num_tasks = len(metrics)
    return Comparison(
        names=names,
        tasks=tuple(rows[:num_tasks]),
        averages=tuple(rows[num_tasks:]),
        notes=tuple(notes),
    )


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


def comparison_findings(comparison: Comparison) -> list[str]:
    """Return the conclusions: overall, by task, and what they do not cover."""
    sentences = [_conclusion(row, comparison.names) for row in comparison.overall]
    if len(comparison.tasks) > 1:
        tests = {row.task: row.p_value for row in comparison.tasks if row.p_value is not None}
        p_values = adjust_by_holm(tests)
        better: tuple[list[str], list[str]] = ([], [])
        for row in comparison.tasks:
            if row.difference.excludes_zero and p_values.get(row.task, 0.0) < SIGNIFICANT:
                better[row.better].append(row.task)
        decided = zip(comparison.names, better, strict=True)
        parts = [f"{name} is better on {', '.join(tasks)}" for name, tasks in decided if tasks]
        if not parts:
            parts = ["none is decided"]
        elif sum(map(len, better)) < len(comparison.tasks):
            parts.append("the others are not decided")
        holm = f" (p-values by Holm for {format_count(len(tests), 'test')})"
        sentences.append(f"by task: {'; '.join(parts)}{holm if len(tests) > 1 else ''}")
    return [
        *sentences,
        "The intervals are about other items of the same kind; other trainings of the two models "
        "may differ by more.",
    ]


def _conclusion(row: ComparedScore, names: tuple[str, str]) -> str:
    quality = "accuracy" if row.is_accuracy else "bits per byte"
    of_task = "" if row.task == row.metric else f" of {row.task}"
    subject = f"average {quality}" if row.task == AVERAGE else f"{quality}{of_task}"
    if (row.only_first, row.only_second) == (0, 0):
        items = format_count(row.num_items, "item")
        return f"{subject}: no difference, both are right on the same of {items}"
    interval = row.difference
    value, low, high = row.difference_texts
    unit = " points" if row.is_accuracy else ""
    test = ""
    if row.p_value is not None:
        p_value = _p_value_text(row.p_value)
        test = f", McNemar p {p_value if p_value.startswith('<') else f'= {p_value}'}"
    is_significant = row.p_value is None or row.p_value < SIGNIFICANT
    if interval.excludes_zero and is_significant:
        verdict = f"{names[row.better]} is better"
    elif interval.excludes_zero != is_significant and row.p_value is not None:
        verdict = "not decided, as interval and test disagree"
    else:
        verdict = "not decided, as the interval contains zero"
    return f"{subject}: {verdict} ({value}{unit}, 95 % interval {low} to {high}{test})"


def comparison_table(comparison: Comparison) -> Table:
    """Return a row for each task and average.

    The columns `A` and `B` are the two models, `b` and `c` the items that only A, and only B, gets
    right.
    """
    columns = (
        *(Column("task", is_text=True), Column("metric", 5, is_text=True), Column("A", 2)),
        *(Column("B", 2), Column("B - A"), Column("95 % interval", 3), Column("items", 4)),
        *(Column("left out", 8), Column("b", 7), Column("c", 6), Column("p")),
    )
    rows = []
    for row in (*comparison.tasks, *comparison.averages):
        value, low, high = row.difference_texts
        counts = (row.num_items, row.num_left_out, row.only_first, row.only_second)
        cells = (
            *(row.task, f"{row.metric}, %" if row.is_accuracy else row.metric),
            *(row.text(row.first), row.text(row.second), value, f"{low} to {high}"),
            *("" if count is None else f"{count:,}" for count in counts),
            "" if row.p_value is None else _p_value_text(row.p_value),
        )
        rows.append(TableRow(cells, is_first=row in comparison.averages[:1]))
    return Table(columns, rows)


def _p_value_text(p_value: float) -> str:
    """Write a p-value with two digits that matter: `0.031`, or `< 0.0001`."""
    if p_value < 1e-4:
        return "< 0.0001"
    return f"{p_value:.4f}" if p_value < 0.01 else f"{p_value:.2g}" if p_value < 1 else "1"
