"""Models that were evaluated together: their differences over the items that all answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.reporting.comparison import AVERAGE, Difference, differences_from_first


def task(
    values: Sequence[Any], *, name: str = "task", metric: str = "acc", first_number: int = 0
) -> TaskResult:
    """Return a result whose items are numbered from `first` on."""
    return TaskResult(
        name=name,
        version="1.0",
        num_items=len(values),
        metrics={},
        items=[f"{name}-{number}" for number in range(first_number, first_number + len(values))],
        values={metric: list(values)},
    )


def answers(right: int, wrong: int) -> list[float]:
    return [1.0] * right + [0.0] * wrong


def differences(
    models: Mapping[str, Sequence[TaskResult]], **groups: tuple[str, ...]
) -> dict[tuple[str, str, str], Difference]:
    evaluations = {
        name: EvaluationResult(results={t.name: t for t in tasks}, groups=groups)
        for name, tasks in models.items()
    }
    list_of_differences = differences_from_first(evaluations)
    assert all(difference.against == next(iter(models)) for difference in list_of_differences)
    return {
        (difference.model, difference.task, difference.metric): difference
        for difference in list_of_differences
    }


def test_a_difference_is_paired_and_its_interval_far_shorter_than_an_unpaired_one():
    models = {"a": answers(300, 200), "b": answers(320, 180), "c": answers(280, 220)}
    by_model = differences({name: [task(values)] for name, values in models.items()})
    assert [*by_model] == [
        (model, name, metric)
        for name, metric in (("task", "acc"), (AVERAGE, "accuracy"))
        for model in ("b", "c")
    ]
    difference = by_model["b", "task", "acc"]
    assert difference.interval.value == pytest.approx(0.04)
    assert difference.num_items == 500
    # Of 500 items 20 changed, all in one direction: a standard error of sqrt(0.04 * 0.96 / 500).
    error = math.sqrt(0.04 * 0.96 / 500)
    assert difference.interval.high - difference.interval.low == pytest.approx(
        2 * 1.96 * error, rel=0.06
    )
    assert by_model["c", AVERAGE, "accuracy"].interval.value == pytest.approx(-0.04)


def test_an_average_counts_a_group_once_and_bits_have_their_own():
    results_of_a = [task(answers(50, 50), name=name) for name in ("x", "y", "z")]
    results_of_b = [
        task(answers(50 + more, 50 - more), name=name)
        for name, more in (("x", 10), ("y", -4), ("z", 20))
    ]
    bits = 2 + np.random.default_rng(0).normal(size=60) / 10
    texts = [
        task([[-value * math.log(2) * 100, 100.0] for value in bits - less], name="text",
             metric="bits_per_byte")
        for less in (0.0, 0.05)
    ]  # fmt: skip
    by_model = differences(
        {"a": [*results_of_a, texts[0]], "b": [*results_of_b, texts[1]]}, xy=("x", "y")
    )
    average = by_model["b", AVERAGE, "accuracy"]
    assert average.interval.value == pytest.approx(((0.10 - 0.04) / 2 + 0.20) / 2)
    assert average.num_items == 300
    for name in ("text", AVERAGE):
        better = by_model["b", name, "bits_per_byte"]
        assert better.interval.value == pytest.approx(-0.05)
        assert better.interval.excludes_zero


def test_items_that_one_model_has_not_answered_do_not_count():
    first_task = task(answers(50, 50))
    second_task = task(answers(30, 70), first_number=40)
    by_model = differences({"a": [first_task], "b": [second_task]})
    # Both answered 40 to 99: the first 10 of them rightly, and the second all of 40 to 69.
    for name, metric in (("task", "acc"), (AVERAGE, "accuracy")):
        difference = by_model["b", name, metric]
        assert difference.num_items == 60
        assert difference.interval.value == pytest.approx((30 - 10) / 60)


def test_one_model_and_models_without_a_common_item_have_no_differences():
    assert differences({"a": [task(answers(5, 5))]}) == {}
    without_a_common_item = [task(answers(5, 5), first_number=10)]
    assert differences({"a": [task(answers(5, 5))], "b": without_a_common_item}) == {}
