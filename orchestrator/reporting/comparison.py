"""Two evaluations on the same items: paired differences, what they decide, and a table of them.

Differences are the second model minus the first. Tasks of different versions, and tasks without a
metric or an item in common, are left out with the reason. The average over accuracies is that of
`EvaluationResult.accuracy`; its test counts the items of all its tasks together.

An accuracy is decided if the interval of the difference excludes zero and McNemar's test agrees:
with few items that only one model gets right, bootstrap intervals are too short. Of many single
tasks some differ by chance, so their p-values are corrected for their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.records.evaluation import BITS_METRIC, EvaluationResult, TaskResult
from orchestrator.reporting.sections import Column, Table, TableRow
from orchestrator.reporting.statistics import (
    INTERVAL_LEVEL,
    NUM_RESAMPLES,
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

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same items."""

    names: tuple[str, str]
    rows: list[Row]
    """One for each task, then the averages of the accuracies and of the bits per byte where there
    are several. `task` (or `AVERAGE`), `metric`; `first` and `second`, the scores on the
    `num_items` that both models answered; `num_left_out`, the items that only one of them answered;
    `difference`, with its 95 % interval `low` and `high`; `only_first` and `only_second`, the items
    that only one of them gets right, and `p_value` of McNemar's test: None unless all are right or
    wrong."""
    notes: list[str]
    """What is not compared, and what else differs between the two evaluations."""

    @property
    def tasks(self) -> list[Row]:
        """The rows of single tasks."""
        return [row for row in self.rows if row["task"] != AVERAGE]

    @property
    def overall(self) -> list[Row]:
        """The averages; the task itself where there is only one of its kind."""
        averages = [row for row in self.rows if row["task"] == AVERAGE]
        averaged = {is_accuracy(row) for row in averages}
        return [*averages, *(row for row in self.tasks if is_accuracy(row) not in averaged)]


def is_accuracy(row: Row) -> bool:
    """Return whether a row's score is a share of right items; bits per byte otherwise."""
    return bool(row["metric"] != BITS_METRIC)


def compare_evaluations(
    first: EvaluationResult,
    second: EvaluationResult,
    names: tuple[str, str],
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> Comparison:
    """Compare two evaluations, item by item.

    Args:
        names: What to call the two models.
        num_resamples: Number of draws of the items for the intervals.

    Raises:
        UserError: If no task can be compared; says why for each of them.
    """
    notes = []
    for name, own, other in ((names[0], first, second), (names[1], second, first)):
        if more := [task for task in own.results if task not in other.results]:
            notes.append(f"only {name} has {', '.join(more)}")
    shared = []
    for task in (task for task in first.results if task in second.results):
        one, two = first.results[task], second.results[task]
        if reason := _reason_against(one, two, names):
            notes.append(f"{task} is not compared: {reason}")
            continue
        shared.append(task)
        if one.num_fewshot != two.num_fewshot:
            notes.append(
                f"{task}: the prompts differ, with {one.num_fewshot} solved examples for "
                f"{names[0]} and {two.num_fewshot} for {names[1]}"
            )

    evaluations = {
        name: [EvaluationResult(results={t: run.results[t] for t in shared}, groups=run.groups)]
        for name, run in (("first", first), ("second", second))
    }
    paired = pair_scores(evaluations, num_resamples=num_resamples)
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
        difference = scores.difference(1, 0)
        rows.append(
            {
                "task": task,
                "metric": metric,
                "first": float(scores.observed[0]),
                "second": float(scores.observed[1]),
                "num_items": values.shape[1],
                "num_left_out": sum(paired.left_out[member] for member in members),
                "difference": difference.value,
                "only_first": counts and counts[0],
                "only_second": counts and counts[1],
                "p_value": counts and mcnemar_p_value(*counts),
                "low": difference.low,
                "high": difference.high,
            }
        )
    return Comparison(names=names, rows=rows, notes=notes)


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
    names, tasks = comparison.names, comparison.tasks
    sentences = [_conclusion(row, names) for row in comparison.overall]
    if len(tasks) > 1:
        tests = {row["task"]: row["p_value"] for row in tasks if row["p_value"] is not None}
        p_values = adjust_by_holm(tests)
        better: dict[str, list[str]] = {name: [] for name in names}
        for row in tasks:
            if _excludes_zero(row) and p_values.get(row["task"], 0.0) < SIGNIFICANT:
                better[names[_better(row)]].append(row["task"])
        parts = [f"{name} is better on {', '.join(own)}" for name, own in better.items() if own]
        if not parts:
            parts = ["none is decided"]
        elif sum(map(len, better.values())) < len(tasks):
            parts.append("the others are not decided")
        holm = f" (p-values by Holm for {format_count(len(tests), 'test')})"
        sentences.append(f"by task: {'; '.join(parts)}{holm if len(tests) > 1 else ''}")
    return [
        *sentences,
        "The intervals are about other items of the same kind; other trainings of the two models "
        "may differ by more.",
    ]


def _conclusion(row: Row, names: tuple[str, str]) -> str:
    task, p_value = row["task"], row["p_value"]
    quality = "accuracy" if is_accuracy(row) else "bits per byte"
    of_task = "" if task == row["metric"] else f" of {task}"
    subject = f"average {quality}" if task == AVERAGE else f"{quality}{of_task}"
    if (row["only_first"], row["only_second"]) == (0, 0):
        items = format_count(row["num_items"], "item")
        return f"{subject}: no difference, both are right on the same of {items}"
    value, low, high = (_text(row, name, "+") for name in ("difference", "low", "high"))
    unit = " points" if is_accuracy(row) else ""
    is_significant = p_value is None or p_value < SIGNIFICANT
    verdict = "not decided, as the interval contains zero"
    if _excludes_zero(row) and is_significant:
        verdict = f"{names[_better(row)]} is better"
    elif _excludes_zero(row) != is_significant and p_value is not None:
        verdict = "not decided, as interval and test disagree"
    test = "" if p_value is None else f", McNemar p {_p_value_text(p_value, '= ')}"
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
    rows: list[TableRow] = []
    for row in comparison.rows:
        counts = [row[n] for n in ("num_items", "num_left_out", "only_first", "only_second")]
        value, low, high = (_text(row, name, "+") for name in ("difference", "low", "high"))
        cells = (
            *(row["task"], f"{row['metric']}, %" if is_accuracy(row) else row["metric"]),
            *(_text(row, "first"), _text(row, "second"), value, f"{low} to {high}"),
            *("" if count is None else f"{count:,}" for count in counts),
            "" if row["p_value"] is None else _p_value_text(row["p_value"]),
        )
        is_first = row["task"] == AVERAGE and rows[-1].cells[0] != AVERAGE
        rows.append(TableRow(cells, is_first=is_first))
    return Table(columns, rows)


def _excludes_zero(row: Row) -> bool:
    return bool(row["low"] > 0 or row["high"] < 0)


def _better(row: Row) -> int:
    """Return the number of the better model, 0 or 1."""
    return int((row["difference"] > 0) == is_accuracy(row))


def _text(row: Row, name: str, sign: str = "") -> str:
    """Write a score, or a difference with its sign; accuracies in percent without the mark."""
    return f"{100 * row[name]:{sign}.2f}" if is_accuracy(row) else f"{row[name]:{sign}.4f}"


def _p_value_text(p_value: float, equal: str = "") -> str:
    """Write a p-value with two digits that matter: `0.031`, or `< 0.0001`."""
    if p_value < 1e-4:
        return "< 0.0001"
    digits = f"{p_value:.4f}" if p_value < 0.01 else f"{p_value:.2g}" if p_value < 1 else "1"
    return equal + digits
