"""Seeds of one model: one point on the front, with the spread in its error."""

from __future__ import annotations

import math

import pytest
from sample_trials import sample_front, sample_trial

from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.records.trial import Trial
from orchestrator.reporting.confidence import with_confidence
from orchestrator.reporting.pareto import evaluations
from orchestrator.reporting.results import result_table


def _seed(number: int, accuracy: float, group: str | None = "r = 1") -> Trial:
    return sample_trial(
        key=f"key-{group}-{number}",
        role="trial",
        method="iiet",
        schedule=(1, 1),
        label=f"{group}, seed {number}",
        cost={"evaluations": 4.0},
        quality={"accuracy": accuracy, "accuracy_stderr": 0.03, "validation_loss": 4 + accuracy},
        checkpoint=f"/runs/{number}",
        seed=number,
        group=group,
    )


def test_the_error_combines_the_spread_over_seeds_and_over_items() -> None:
    table = result_table([_seed(0, 0.30), _seed(1, 0.32), _seed(2, 0.37)])
    (one,) = table["trial"]
    assert (one.label, one.numbers["train/seeds"], one.checkpoint) == ("r = 1", 3, "/runs/0")
    assert one.numbers["quality/accuracy"] == pytest.approx(0.33)
    over_seeds = (0.03**2 + 0.01**2 + 0.04**2) / 2 / 3
    assert one.numbers["quality/accuracy_stderr"] == pytest.approx(math.sqrt(over_seeds + 0.03**2))
    assert one.numbers["quality/validation_loss_stderr"] == pytest.approx(math.sqrt(over_seeds))
    assert [seed.seed for seed in table["seeds"][one.key]] == [0, 1, 2]
    assert table["quality/accuracy"][one.key] == one.numbers["quality/accuracy"]


def test_results_without_other_seeds_stay_as_they_are() -> None:
    alone, other = _seed(0, 0.3), _seed(0, 0.4, None).model_copy(update={"key": "other"})
    table = result_table([alone, other])
    assert [*table["trial"]] == [alone, other]
    assert table["seeds"].to_dict() == {alone.key: (alone,), "other": (other,)}


def test_an_interval_is_wider_where_the_seeds_differ() -> None:
    def answers(*right: int) -> EvaluationResult:
        items = [str(number) for number in range(100)]
        values = [1.0 if number in right else 0.0 for number in range(100)]
        task = TaskResult(
            name="t", version="1", num_items=100, num_fewshot=0, metrics={"acc": sum(values) / 100},
            items=items, values={"acc": values},
        )  # fmt: skip
        return EvaluationResult(results={"t": task})

    def width(first: int, second: int) -> float:
        results = [
            _seed(0, first / 100),
            _seed(1, second / 100),
            _seed(0, 0.5, None).model_copy(update={"key": "full"}),
        ]
        front = sample_front(results)
        items = {
            results[0].key: answers(*range(first)),
            results[1].key: answers(*range(second)),
            "full": answers(*range(50)),
        }
        front = with_confidence(front, evaluations(front, items), num_resamples=2000)
        point = next(p for p in front.points if p.result.key != "full")
        assert point.confidence
        assert point.confidence.overall
        return point.confidence.overall.own.high - point.confidence.overall.own.low

    assert width(20, 60) > 1.5 * width(40, 40)
