"""What can be concluded from a comparison of two models, as sentences.

An accuracy is decided if the interval of the difference excludes zero and McNemar's test agrees:
with few items that only one model gets right, bootstrap intervals are too short. Of many single
tasks some differ by chance, so their p-values are corrected for their number.
"""

from __future__ import annotations

from orchestrator.reporting.bootstrap import INTERVAL_LEVEL
from orchestrator.reporting.comparison import AVERAGE, ComparedScore, Comparison
from orchestrator.reporting.mcnemar import adjust_by_holm
from orchestrator.terminal.render import format_count

SIGNIFICANT = 1 - INTERVAL_LEVEL
"""A p-value below it decides."""


def comparison_findings(comparison: Comparison) -> list[str]:
    """Return the conclusions: overall, by task, and what they do not cover."""
    lines = [_overall(row, comparison.names) for row in comparison.overall]
    if sentence := _by_task(comparison):
        lines.append(sentence)
    return [
        *lines,
        "The intervals are about other items of the same kind; other trainings of the two models "
        "may differ by more.",
    ]


def format_score(value: float, *, is_accuracy: bool, is_difference: bool = False) -> str:
    """Write a score, or a difference with its sign: accuracies in percent without the mark."""
    sign = "+" if is_difference else ""
    return f"{100 * value:{sign}.2f}" if is_accuracy else f"{value:{sign}.4f}"


def format_p_value(p_value: float) -> str:
    """Write a p-value with two digits that matter: `0.031`, or `< 0.0001`."""
    if p_value < 1e-4:
        return "< 0.0001"
    return f"{p_value:.4f}" if p_value < 0.01 else f"{p_value:.2g}" if p_value < 1 else "1"


def _overall(row: ComparedScore, names: tuple[str, str]) -> str:
    quality = "accuracy" if row.is_accuracy else "bits per byte"
    of_task = "" if row.task == row.metric else f" of {row.task}"
    of_what = f"average {quality}" if row.task == AVERAGE else f"{quality}{of_task}"
    difference = row.difference
    unit = " points" if row.is_accuracy else ""
    value, low, high = (
        format_score(number, is_accuracy=row.is_accuracy, is_difference=True)
        for number in (difference.value, difference.low, difference.high)
    )
    test = f", McNemar p {_equals(row.mcnemar.p_value)}" if row.mcnemar else ""
    numbers = f"{value}{unit}, 95 % interval {low} to {high}{test}"
    if row.mcnemar and not row.mcnemar.only_first + row.mcnemar.only_second:
        items = format_count(row.num_items, "item")
        return f"{of_what}: no difference, both are right on the same of {items}"
    is_significant = row.mcnemar is None or row.mcnemar.p_value < SIGNIFICANT
    if difference.excludes_zero and is_significant:
        return f"{of_what}: {names[_better(row)]} is better ({numbers})"
    if difference.excludes_zero != is_significant and row.mcnemar:
        return f"{of_what}: not decided, as interval and test disagree ({numbers})"
    return f"{of_what}: not decided, as the interval contains zero ({numbers})"


def _by_task(comparison: Comparison) -> str | None:
    """Say which of several tasks are decided, with corrected p-values."""
    if len(comparison.tasks) < 2:
        return None
    tests = {row.task: row.mcnemar.p_value for row in comparison.tasks if row.mcnemar}
    p_values = adjust_by_holm(tests)
    better: tuple[list[str], list[str]] = ([], [])
    for row in comparison.tasks:
        if row.difference.excludes_zero and p_values.get(row.task, 0.0) < SIGNIFICANT:
            better[_better(row)].append(row.task)
    parts = [
        f"{name} is better on {', '.join(tasks)}"
        for name, tasks in zip(comparison.names, better, strict=True)
        if tasks
    ]
    if not parts:
        parts = ["none is decided"]
    elif sum(map(len, better)) < len(comparison.tasks):
        parts.append("the others are not decided")
    how = f" (p-values by Holm for {format_count(len(tests), 'test')})" if len(tests) > 1 else ""
    return f"by task: {'; '.join(parts)}{how}"


def _better(row: ComparedScore) -> int:
    """Return the number of the better model, 0 or 1."""
    return int((row.difference.value > 0) == row.is_accuracy)


def _equals(p_value: float) -> str:
    text = format_p_value(p_value)
    return text if text.startswith("<") else f"= {text}"
