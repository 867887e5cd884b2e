"""Standard errors against independent ones, averages, and the JSON round trip."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from orchestrator.records.evaluation import EvaluationResult, TaskResult, standard_error


def task(name: str, **metrics: float) -> TaskResult:
    return TaskResult(
        name=name,
        version="1",
        num_items=10,
        num_fewshot=0,
        metrics=metrics,
        items=["a", "b"],
        values={"acc": [1.0, 0.0]},
    )


def evaluation(*results: TaskResult, **groups: tuple[str, ...]) -> EvaluationResult:
    return EvaluationResult(results={r.name: r for r in results}, groups=groups)


def test_the_error_of_a_mean():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    expected = statistics.stdev(values) / math.sqrt(5)
    assert standard_error("mean", values) == pytest.approx(expected)


def ratio(pairs: list[tuple[float, float]]) -> float:
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs)


@pytest.mark.parametrize(
    ("aggregation", "aggregate"),
    [
        ("perplexity", lambda pairs: math.exp(-statistics.fmean(a for a, _ in pairs))),
        ("weighted_perplexity", lambda pairs: math.exp(-ratio(pairs))),
        ("bits_per_byte", lambda pairs: -ratio(pairs) / math.log(2)),
    ],
)
def test_errors_by_the_delta_method_agree_with_the_bootstrap(aggregation, aggregate):
    draw = random.Random(0)
    weights = [draw.uniform(5, 40) for _ in range(400)]
    pairs = [(-w * draw.uniform(0.1, 0.3), w) for w in weights]
    if aggregation == "perplexity":
        pairs = [(a / 10, w) for a, w in pairs]
    resampled = [aggregate(draw.choices(pairs, k=len(pairs))) for _ in range(600)]
    values = [a for a, _ in pairs] if aggregation == "perplexity" else pairs
    assert standard_error(aggregation, values) == pytest.approx(
        statistics.stdev(resampled), rel=0.12
    )


def test_accuracy_uses_normalized_accuracy_if_reported():
    result = evaluation(
        task("piqa", acc=0.6, acc_norm=0.5, acc_norm_stderr=0.03),
        task("lambada", acc=0.3, acc_stderr=0.04, perplexity=20.0),
        task("text", bits_per_byte=1.25, bits_per_byte_stderr=0.01),
    )
    assert result.accuracies == {"piqa": (0.5, 0.03), "lambada": (0.3, 0.04)}
    assert result.accuracy == pytest.approx(0.4)
    quality = result.quality()
    assert quality["accuracy_stderr"] == pytest.approx(0.05 / 2)
    assert (quality["bits_per_byte"], quality["bits_per_byte_stderr"]) == (1.25, 0.01)
    assert result.num_items == 30


def test_a_group_counts_as_one_task_and_only_measured_numbers_are_there():
    result = evaluation(
        task("b1", acc=0.2, acc_stderr=0.0),
        task("b2", acc=0.4, acc_stderr=0.0),
        task("piqa", acc=0.5, acc_stderr=0.0),
        blimp=("b1", "b2"),
    )
    assert result.accuracy == pytest.approx((0.3 + 0.5) / 2)
    assert EvaluationResult.model_validate_json(result.model_dump_json()) == result
    quality = evaluation(task("text", bits_per_byte=1.0)).quality()
    assert quality == {"bits_per_byte": 1.0, "text/bits_per_byte": 1.0}
    assert math.isnan(evaluation().accuracy)
    assert standard_error("mean", [1.0]) is None
    assert standard_error("median", [1.0, 2.0]) is None
