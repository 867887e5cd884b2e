"""Findings: the sentences claim no more than the numbers support."""

from __future__ import annotations

from dataclasses import replace

from sample_trials import sample_front

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial
from orchestrator.reporting.confidence import with_confidence
from orchestrator.reporting.findings import findings
from orchestrator.reporting.mlflow_report import front_metrics
from orchestrator.settings import TrainingSettings


def with_accuracy(result: Trial, accuracy: float) -> Trial:
    return result.with_numbers("quality", {"accuracy": accuracy})


def test_the_first_sentence_is_the_cheapest_that_keeps_the_quality(
    sample_results: list[Trial],
) -> None:
    first = findings(sample_front(sample_results))[0]
    assert first.startswith(
        "The cheapest model that keeps 99% of the full model's quality is 0,1,1,1,1,1"
    )
    assert "99.4% of the full model's, at 46% of its NFE (11 of 24)" in first


def test_a_baseline_is_called_worse_only_beyond_the_error(
    sample_results: list[Trial],
) -> None:
    def about_vanilla(accuracy: float) -> str:
        results = [
            with_accuracy(r, accuracy) if r.label == "vanilla" else r for r in sample_results
        ]
        return next(s for s in findings(sample_front(results)) if s.startswith("vanilla"))

    # Both have an error of 1.21 points; that of the difference is 1.71, and 1.96 times it 3.35.
    said = about_vanilla(0.4437 - 0.034)
    assert "is worse than 0,1,1,1,1,1 by 3.4 points, 0.046 to 6.8 at 95%, unpaired" in said
    for accuracy in (0.4437 - 0.033, 0.4176, 0.44, 0.4437 + 0.033):
        assert "differ by less than these items can resolve" in about_vanilla(accuracy)
    assert "is better than 0,1,1,1,1,1" in about_vanilla(0.5)
    # It costs as little as the cheapest, so it beats every member that is not better.
    assert "it beats 0,0,0,0,0,0; 0,1,0,0,0,1" in about_vanilla(0.44)


def test_a_distilled_baseline_is_compared_with_the_schedule_of_its_cost(
    sample_results: list[Trial],
) -> None:
    (vanilla,) = (r for r in sample_results if r.label == "vanilla")
    deep = vanilla.model_copy(
        update={
            "key": "deep", "label": "vanilla, 11 layers, distilled", "parent": "7e1c0ffee0000000",
        }
    ).with_numbers("cost", {"evaluations": 10.9})  # fmt: skip
    said = findings(sample_front([*sample_results, with_accuracy(deep, 0.3)]))
    (about,) = (sentence for sentence in said if sentence.startswith("vanilla, 11 layers"))
    assert "is worse than 0,1,1,1,1,1, the schedule of the nearest cost, by 14 points" in about
    assert not any("random weights" in sentence for sentence in said)
    job = TrainingJob(
        run_folder="", tokens_folder="", model=deep.model, recipe=TrainingSettings(),
        objective="distill", teacher_folder="teacher",
    )  # fmt: skip
    deep = deep.model_copy(update={"job": job})
    (about,) = (s for s in findings(sample_front([*sample_results, deep])) if "random weights" in s)
    assert "trained on 307,200 tokens; the students' weights also saw 307,200 tokens" in about


def test_claims_have_their_confidence(
    sample_results: list[Trial], sample_evaluations: dict[str, EvaluationResult]
) -> None:
    front = with_confidence(sample_front(sample_results), sample_evaluations, num_resamples=1000)
    said = findings(front)
    kept = front.cheapest_keeping(0.99)
    assert kept is not None
    assert kept.confidence is not None
    assert 0.8 < (kept.confidence.keeps or 0) < 0.95
    assert f"it keeps 99% with confidence {kept.confidence.keeps:.2f}" in said[0]
    # The cheapest is not certain enough; a costlier one is.
    assert said[1].startswith(
        "The cheapest model that keeps it with a confidence of 0.95 or more is "
    )
    assert "with confidence >0.99" in said[1]
    vanilla = next(s for s in said if s.startswith("vanilla"))
    # Over the same items: separate errors make it 1.7.
    assert "is worse than 0,1,1,1,1,1 by 2.6 points, 2.0 to 3.3 in 95% of the draws" in vanilla
    assert "the share of 1,000 draws in which the claim holds" in said[-1]
    assert (
        "Each draw samples 2,000 of the 2,000 items that all models answered, with replacement"
        in said[-1]
    )
    assert front_metrics(front)["front/keeping_99_confidence_keeps_99"] == kept.confidence.keeps


def test_a_confidence_of_exactly_0_95_is_enough(
    sample_results: list[Trial], sample_evaluations: dict[str, EvaluationResult]
) -> None:
    front = with_confidence(sample_front(sample_results), sample_evaluations, num_resamples=100)

    kept = front.cheapest_keeping(0.99)
    assert kept is not None
    dearer = next(p for p in front.points if p.is_candidate and p.cost > kept.cost)

    def said(keeps: dict[str, float]) -> str:
        points = tuple(
            replace(p, confidence=replace(p.confidence, keeps=keeps.get(p.result.key, 0.5)))
            for p in front.points
            if p.confidence
        )
        return " ".join(findings(replace(front, points=points)))

    sure = "The cheapest model that keeps it with a confidence of 0.95 or more is "
    assert sure not in said({kept.result.key: 0.95})
    assert sure + dearer.result.label in said({kept.result.key: 0.94, dearer.result.key: 0.95})


def test_an_unresolved_difference_is_stated(
    sample_results: list[Trial], sample_evaluations: dict[str, EvaluationResult]
) -> None:
    kept, vanilla = (
        next(r for r in sample_results if r.label == label) for label in ("0,1,1,1,1,1", "vanilla")
    )
    evaluations = {**sample_evaluations, vanilla.key: sample_evaluations[kept.key]}
    front = with_confidence(sample_front(sample_results), evaluations, num_resamples=200)
    said = next(s for s in findings(front) if s.startswith("vanilla"))
    assert "differ by less than these items can resolve (0.0 points, 0.0 to 0.0 in" in said


def test_a_front_that_keeps_no_quality_says_so(sample_results: list[Trial]) -> None:
    results = [with_accuracy(r, 0.2) if r.role == "trial" else r for r in sample_results]
    assert findings(sample_front(results))[0] == (
        "No cheaper model keeps 99% of the full model's quality."
    )
    assert findings(sample_front([])) == [
        "No trial has been measured in accuracy and NFE per token yet."
    ]


def test_metrics_of_the_front_are_finite_numbers(sample_results: list[Trial]) -> None:
    metrics = front_metrics(sample_front(sample_results))
    assert metrics["front/size"] == 6
    assert metrics["front/knee_cost"] == 11
    assert 0.7 < metrics["front/hypervolume"] < 0.8
    assert metrics["front/reference_cost"] == 24
    assert metrics["front/keeping_99_share_of_full"] > 0.99
