"""Evaluations matched by item, and the confidence of the places on a front."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from sample_trials import sample_front, sample_trial

from orchestrator.records.evaluation import EvaluationResult, TaskResult, standard_error
from orchestrator.records.trial import Role
from orchestrator.reporting.confidence import with_confidence
from orchestrator.reporting.front_axes import FrontAxes
from orchestrator.reporting.pareto import Front, FrontPoint
from orchestrator.reporting.statistics import Confidence, pair_scores

NUM_ITEMS = 400


def task(name: str, right: Sequence[float], items: Sequence[str] | None = None) -> TaskResult:
    values = [float(v) for v in right]
    metrics = {"acc": float(np.mean(values)), "acc_stderr": standard_error("mean", values) or 0.0}
    return TaskResult(
        name=name,
        version="1",
        num_items=len(values),
        num_fewshot=0,
        metrics=metrics,
        items=list(items) if items else [f"{name}-{n}" for n in range(len(values))],
        values={"acc": list(values)},
    )


def bits_task(bits: float, num_documents: int = 40) -> TaskResult:
    pairs = [[-bits * math.log(2) * 100 * (1 + n % 3), 100.0 * (1 + n % 3)] for n in range(40)]
    return TaskResult(
        name="bits_per_byte",
        version="1",
        num_items=num_documents,
        num_fewshot=0,
        metrics={"bits_per_byte": bits},
        items=[f"document-{n}" for n in range(num_documents)],
        values={"bits_per_byte": pairs},
    )


def answers(share: float, num_items: int = NUM_ITEMS) -> list[float]:
    """Right answers on the first items: a better model is right wherever a worse one is."""
    return [float(n < share * num_items) for n in range(num_items)]


def evaluation(
    *tasks: TaskResult, groups: dict[str, tuple[str, ...]] | None = None
) -> EvaluationResult:
    return EvaluationResult(results={t.name: t for t in tasks}, groups=groups or {})


def front_of(
    points: dict[str, tuple[Role, float, EvaluationResult]], axes: FrontAxes | None = None
) -> Front:
    results = [
        sample_trial(
            key=name,
            role=role,
            method="iiet",
            label=name,
            cost={"evaluations": cost},
            quality=found.quality(),
        )
        for name, (role, cost, found) in points.items()
    ]
    evaluations = {name: found for name, (_, _, found) in points.items()}
    return with_confidence(sample_front(results, axes), evaluations, num_resamples=2000)


def at(front: Front, name: str) -> FrontPoint:
    return next(point for point in front.points if point.result.key == name)


def sure(front: Front, name: str) -> Confidence:
    confidence = at(front, name).confidence
    assert confidence is not None
    return confidence


@pytest.fixture
def front() -> Front:
    def measured(share: float, bits: float) -> EvaluationResult:
        return evaluation(task("words", answers(share)), bits_task(bits))

    return front_of(
        {
            "teacher": ("teacher", 24.0, measured(0.500, 2.0)),
            "close": ("trial", 12.0, measured(0.4975, 2.01)),
            "poor": ("trial", 6.0, measured(0.25, 2.5)),
            "worse": ("trial", 10.0, measured(0.20, 2.6)),
            "vanilla": ("baseline", 6.0, measured(0.30, 2.4)),
        }
    )


def test_a_model_that_answers_as_the_full_one_keeps_all_of_it_in_every_draw() -> None:
    same = evaluation(task("words", answers(0.5)))
    points: dict[str, tuple[Role, float, EvaluationResult]] = {
        "teacher": ("teacher", 24.0, same), "twin": ("trial", 12.0, same)
    }  # fmt: skip
    evaluations = {name: found for name, (_, _, found) in points.items()}
    front = with_confidence(front_of(points), evaluations, kept_share=1.0, num_resamples=50)
    assert sure(front, "twin").keeps == 1.0


def test_scores_equal_those_of_the_evaluation() -> None:
    tasks = [task(n, answers(s)) for n, s in (("a", 0.3), ("b", 0.5), ("c", 0.9))]
    found = evaluation(*tasks, bits_task(2.2), groups={"both": ("a", "b")})
    draws = pair_scores({"one": [found], "two": [found]}, num_resamples=50)
    assert draws is not None
    accuracy, bits = draws.quality("quality/accuracy"), draws.quality("quality/bits_per_byte")
    assert accuracy is not None
    assert bits is not None
    assert accuracy.observed == pytest.approx([found.accuracy] * 2)
    assert found.accuracy == pytest.approx((0.4 + 0.9) / 2)
    assert bits.observed == pytest.approx([2.2, 2.2])
    of_task = draws.quality("quality/c/acc")
    assert of_task is not None
    assert of_task.observed == pytest.approx([0.9, 0.9])
    assert draws.quality("quality/validation_loss") is None


def test_items_are_matched_by_hash_and_unmatched_ones_counted() -> None:
    one = evaluation(task("words", [1, 0, 1, 0], items=["a", "b", "c", "a"]))
    other = evaluation(
        task("words", [0, 1, 1], items=["c", "a", "x"]), task("more", [1, 1], items=["p", "q"])
    )
    paired = pair_scores({"one": [one], "other": [other]})
    assert paired is not None
    # Shared: `c` and the first `a`. Left out: `b`, the second `a`, `x`, and all of `more`.
    assert paired.items["words"].values.tolist() == [[1.0, 1.0], [1.0, 0.0]]
    assert (paired.num_items, dict(paired.left_out)) == (2, {"words": 3, "more": 2})
    assert pair_scores({"one": [one], "other": [evaluation(task("more", [1.0]))]}) is None


def test_another_task_does_not_change_a_tasks_draws() -> None:
    def drawn(*tasks: TaskResult) -> list[float]:
        paired = pair_scores({"one": [evaluation(*tasks)]}, num_resamples=20)
        assert paired is not None
        return list(paired.scores["words"].drawn[:, 0])

    words = task("words", answers(0.5))
    assert drawn(words) == drawn(task("other", answers(0.2)), words)


def test_runs_of_several_seeds_are_one_model() -> None:
    seeds = [evaluation(task("words", answers(share))) for share in (0.4, 0.6)]
    paired = pair_scores({"several": seeds, "one": seeds[:1]}, num_resamples=2000)
    assert paired is not None
    scores = paired.scores["words"]
    assert scores.observed == pytest.approx([0.5, 0.4])
    assert scores.drawn[:, 0].std() > 2 * scores.drawn[:, 1].std()


def test_places_far_apart_are_certain(front: Front) -> None:
    for name, share in (("poor", 1.0), ("worse", 0.0), ("close", 1.0)):
        assert sure(front, name).on_front == share
    poor, teacher = sure(front, "poor"), sure(front, "teacher")
    assert (poor.keeps, teacher.keeps) == (0.0, 1.0)
    assert teacher.share is not None
    assert (teacher.share.low, teacher.share.high) == (1.0, 1.0)


def test_a_close_model_has_an_intermediate_confidence(front: Front) -> None:
    close = sure(front, "close")
    assert close.share is not None
    assert close.overall is not None
    # It lacks one item that the teacher has. The teacher is better where that item is drawn at all;
    # 99% are kept where it is drawn no more often than once in a hundred right answers.
    assert sure(front, "teacher").on_front == pytest.approx(
        1 - (1 - 1 / NUM_ITEMS) ** NUM_ITEMS, abs=0.03
    )
    assert close.keeps == pytest.approx(0.83, abs=0.03)
    assert close.share.value == pytest.approx(0.995)
    difference = close.overall.against["teacher"]
    assert difference.value == pytest.approx(-0.0025)
    assert -0.01 <= difference.low < difference.high == 0.0
    assert at(front, "close").error == pytest.approx(0.025, abs=0.001)


def test_models_are_compared_with_baselines_which_have_no_place(front: Front) -> None:
    vanilla, close = sure(front, "vanilla"), sure(front, "close")
    assert close.overall is not None
    assert vanilla.on_front is None
    assert list(close.overall.against) == ["teacher", "vanilla"]
    assert close.overall.against["vanilla"].excludes_zero
    assert close.tasks["bits_per_byte"].against["vanilla"].value == pytest.approx(-0.39)


def test_the_share_of_a_loss_is_inverted() -> None:
    points: dict[str, tuple[Role, float, EvaluationResult]] = {
        "teacher": ("teacher", 24.0, evaluation(bits_task(2.0))),
        "close": ("trial", 12.0, evaluation(bits_task(2.01))),
        "poor": ("trial", 6.0, evaluation(bits_task(2.5))),
    }
    front = front_of(points, FrontAxes(quality="quality/bits_per_byte"))
    close, poor = sure(front, "close"), sure(front, "poor")
    assert (close.keeps, poor.keeps) == (1.0, 0.0)
    assert close.share is not None
    assert close.share.value == pytest.approx(2.0 / 2.01)
    assert (close.on_front, poor.on_front) == (1.0, 1.0)


def test_a_result_without_items_has_no_confidence() -> None:
    words = {name: evaluation(task("words", answers(s))) for name, s in (("a", 0.5), ("b", 0.4))}
    results = [
        sample_trial(
            key=name,
            role="trial",
            method="iiet",
            cost={"evaluations": n},
            quality={"accuracy": 0.4},
        )
        for n, name in enumerate(("a", "b", "lost"))
    ]
    front = sample_front(results)
    assert with_confidence(front, {}) is front
    partly = with_confidence(front, words, num_resamples=100)
    assert at(partly, "lost").confidence is None
    a = sure(partly, "a")
    # The lost one competes for the front and is the full model: neither can be told.
    assert (a.on_front, a.keeps, a.share) == (None, None, None)


def test_metrics_are_flat_and_named_by_the_other_model(front: Front) -> None:
    metrics = sure(front, "close").metrics()
    assert metrics["paired/vs_teacher"] == pytest.approx(-0.0025)
    assert metrics["paired/vs_teacher_low"] <= metrics["paired/vs_teacher"]
    assert {"paired/words/vs_vanilla_high", "paired/share_of_full"} <= set(metrics)
    assert {"paired/confidence_keeps_99", "paired/confidence_on_front"} <= set(metrics)
    assert sure(front, "poor").metrics()["paired/confidence_keeps_99"] == 0.0
    assert all(math.isfinite(value) for value in metrics.values())
