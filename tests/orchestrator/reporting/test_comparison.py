"""Two evaluations compared: differences, tests, what is left out and why, and the conclusions."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.reporting.comparison import (
    Comparison,
    compare_evaluations,
    comparison_findings,
    comparison_table,
)
from orchestrator.workspace.errors import UserError

NAMES = ("base", "new")


def task(
    values: Sequence[Any], *, name: str = "task", metric: str = "acc", first: int = 0, **more: Any
) -> TaskResult:
    """Return a result whose items are numbered from `first` on."""
    return TaskResult(
        **{
            "name": name,
            "version": "1.0",
            "num_items": len(values),
            "metrics": {},
            "items": [f"{name}-{number}" for number in range(first, first + len(values))],
            "values": {metric: list(values)},
            **more,
        }
    )


def answers(right: int, wrong: int, *, offset: int = 0) -> list[float]:
    return list(np.roll([1.0] * right + [0.0] * wrong, offset))


def compared(first: Sequence[TaskResult], second: Sequence[TaskResult], **more: Any) -> Comparison:
    evaluations = [
        EvaluationResult(results={t.name: t for t in tasks}, **more) for tasks in (first, second)
    ]
    return compare_evaluations(evaluations[0], evaluations[1], NAMES, num_resamples=2_000)


def test_the_difference_is_paired_and_its_interval_far_shorter_than_an_unpaired_one():
    found = compared([task(answers(300, 200))], [task(answers(320, 180))])
    [row] = found.tasks
    assert (row["first"], row["second"]) == (0.6, 0.64)
    assert row["difference"] == pytest.approx(0.04)
    # Of 500 items 20 changed, all in one direction: a standard error of sqrt(0.04 * 0.96 / 500).
    error = math.sqrt(0.04 * 0.96 / 500)
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert (row["only_first"], row["only_second"]) == (0, 20)
    assert (row["num_items"], row["num_left_out"]) == (500, 0)
    assert (found.tasks, found.overall) == ([row], [row])
    # Items of one model only are left out and counted.
    [row] = compared([task(answers(6, 4))], [task([1.0] * 8, first=4)]).tasks
    assert [row[n] for n in ("num_items", "num_left_out", "first", "second")] == [6, 6, 2 / 6, 1]


def test_the_average_counts_a_group_once_and_tests_all_items_together():
    first = [task(answers(50, 50), name=name) for name in ("x", "y", "z")]
    second = [
        task(answers(50 + more, 50 - more), name=name)
        for name, more in (("x", 10), ("y", -4), ("z", 20))
    ]
    found = compared(first, second, groups={"xy": ("x", "y")})
    average = found.rows[-1]
    assert average["difference"] == pytest.approx(((0.10 - 0.04) / 2 + 0.20) / 2)
    assert (average["only_first"], average["only_second"]) == (4, 30)
    assert (average["num_items"], average["metric"]) == (300, "accuracy")
    assert found.overall == [average]


def test_bits_per_byte_have_an_interval_and_no_test():
    rng = np.random.default_rng(0)
    bits = 2 + rng.normal(size=60) / 10
    pairs = [[[-value * math.log(2) * 100, 100.0] for value in bits - less] for less in (0.0, 0.05)]
    texts = [task(values, name="text", metric="bits_per_byte") for values in pairs]
    found = compared(texts[:1], texts[1:])
    [row] = found.tasks
    assert (row["only_first"], row["p_value"]) == (None, None)
    assert row["difference"] == pytest.approx(-0.05)
    assert "bits per byte of text: new is better (-0.0500, 95 %" in comparison_findings(found)[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "2.0"}, "base has version 1.0 of the task, new has version 2.0"),
        ({"metric": "exact_match:strict-match"}, "base has acc, new has exact_match:strict-match"),
        ({"first": 50}, "its 10 items under base and 10 items under new all differ"),
        ({"name": "other"}, "only base has task; only new has other"),
    ],
)
def test_what_cannot_be_compared_is_an_error_that_says_why(changes, reason):
    first, second = task(answers(5, 5)), task(answers(6, 4), **changes)
    with pytest.raises(UserError, match="nothing can be compared") as error:
        compared([first], [second])
    assert reason in str(error.value)
    # Beside a task that can be compared, the same sentence is a note.
    good = task(answers(5, 5), name="good")
    found = compared([first, good], [second, good])
    assert [row["task"] for row in found.tasks] == ["good"]
    assert reason in "; ".join(found.notes)


@pytest.mark.parametrize(
    ("right", "offset", "conclusion"),
    [
        (60, 0, "new is better (+10.00 points, 95 %"),
        (40, 0, "base is better (-10.00 points, 95 %"),
        (52, 25, "not decided, as the interval contains zero"),
        (55, 0, "not decided, as interval and test disagree"),  # b = 0, c = 5: p = 0.0625.
        (50, 0, "no difference, both are right on the same of 100 items"),
    ],
)
def test_a_difference_is_decided_only_if_interval_and_test_agree(right, offset, conclusion):
    found = compared([task(answers(50, 50))], [task(answers(right, 100 - right, offset=offset))])
    assert conclusion in comparison_findings(found)[0]


def test_tasks_are_decided_by_p_values_for_all_of_them_together():
    # McNemar's p of 6 changes in one direction is 0.031; for three tests that is 0.094.
    first = [task(answers(50, 50), name=name) for name in ("x", "y", "z")]
    second = [
        task(answers(50 + more, 50 - more), name=name)
        for name, more in (("x", 6), ("y", 0), ("z", -20))
    ]
    sentences = "\n".join(comparison_findings(compared(first, second)))
    assert "by task: base is better on z; the others are not decided (p-values by Holm" in sentences
    fewer = "\n".join(comparison_findings(compared(first[:2], second[:2])))
    assert "by task: none is decided" in fewer


def test_the_table_breaks_no_number_and_a_note_says_what_differs():
    tasks = [task(answers(500, 500), name=name) for name in ("arc_challenge", "lambada_openai")]
    better = [task(answers(530, 470), name=t.name, num_fewshot=5) for t in tasks]
    found = compared(tasks, better)
    assert "0 solved examples for base and 5 for new" in found.notes[0]
    for width in (40, 60, 80, 200):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        console.print(comparison_table(found))
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert text.count("+3.00") == 3
        assert ("95 % interval" in text) == (width >= 80)
        assert ("left out" in text) == (width >= 200)
