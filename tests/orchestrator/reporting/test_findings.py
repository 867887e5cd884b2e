"""What is said of a front claims no more than the numbers support."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from refusals import assert_names
from sample_trials import keeping, sample_front

from orchestrator.records.metrics import (
    DECODE_MS,
)
from orchestrator.records.trial import Trial
from orchestrator.reporting.findings import (
    better_baselines,
    describe_model,
    describe_pick,
    findings,
)
from orchestrator.reporting.front import Front, FrontAxes, with_confidence
from orchestrator.reporting.pick_rules import PickRule, pick_from_front
from orchestrator.reporting.tables import models_table
from orchestrator.workspace.errors import UserError


@pytest.fixture
def front(sample_results) -> Front:
    return sample_front(sample_results)


def with_accuracy(result: Trial, accuracy: float) -> Trial:
    return result.with_numbers("quality", {"accuracy": accuracy})


def test_the_share_that_a_sentence_says_is_that_of_the_table(sample_results):
    better = with_accuracy(sample_results[-3], 0.5)
    front = sample_front([*sample_results[:-3], better, *sample_results[-2:]])
    assert better.role == "trial"
    share = 0.5 / 0.4465
    assert findings(front)[0].startswith(f"{better.label} keeps {share:.1%} of the teacher's")
    assert f" {share:.1%} " in models_table(front).to_markdown()


def test_nothing_is_said_in_the_milliseconds_of_a_busy_machine(sample_results):
    axes = FrontAxes(cost=DECODE_MS)
    assert "decoding time" in findings(sample_front(sample_results, axes))[0]
    busy = [*sample_results[:-1], sample_results[-1].with_numbers("cost", {"decode_ms_spread": 1})]
    [sentence] = findings(sample_front(busy, axes))
    assert sentence.startswith("Not measured")
    assert "report --time-again" in sentence
    *other_sentences, about_times = findings(sample_front(busy))
    assert other_sentences == findings(sample_front(sample_results))
    [marked] = [
        row for row in models_table(sample_front(busy)).rows if any(" *" in c for c in row.cells)
    ]
    assert marked.key == busy[-1].key
    assert about_times.startswith("Times with * decide nothing")


def test_what_is_said_where_no_model_keeps_the_quality_or_none_has_a_place(sample_results):
    results = [with_accuracy(r, 0.2) if r.role == "trial" else r for r in sample_results]
    headline, nearest, *_ = findings(sample_front(results))
    assert headline == "No cheaper model keeps 99% of the teacher's accuracy."
    assert nearest.startswith("Nearest, 0,0,0,0,0,0: 44.8% at 25% of its NFE")
    nothing_right = [with_accuracy(r, 0.0) for r in sample_results]
    without_points = sample_front(nothing_right, FrontAxes(quality="quality/other"))
    expected = "no trial of this sweep has other and NFE per token; it has accuracy, bits"
    with pytest.raises(UserError, match=expected):
        pick_from_front(without_points, PickRule(name="knee"))
    assert findings(sample_front([])) == [
        "No trial of this sweep has accuracy and NFE per token; nothing of it is measured yet."
    ]


def test_a_baseline_is_called_worse_only_beyond_the_error(sample_results):
    def about_vanilla(accuracy: float) -> str:
        results = [
            with_accuracy(r, accuracy) if r.label == "vanilla" else r for r in sample_results
        ]
        return " ".join(s for s in findings(sample_front(results)) if "vanilla" in s)

    # Each accuracy has an error of 1.21 points, so the difference has one of 1.71. The student is
    # one of nine: 2.77 times that is 4.74, as 5% in nine parts are outside of 2.77.
    sentences = about_vanilla(0.4437 - 0.048)
    assert_names(sentences, "against 0,1,1,1,1,1: worse, -4.8 points", "-9.5 to -0.1")
    for accuracy in (0.4437 - 0.047, 0.4176, 0.44, 0.4437 + 0.047):
        assert "no difference shown" in about_vanilla(accuracy)
    assert "against 0,1,1,1,1,1: better" in about_vanilla(0.5)
    # Vanilla costs as little as the cheapest, so it beats every member that is not better.
    assert "vanilla beats: 0,0,0,0,0,0; 0,1,0,0,0,1" in about_vanilla(0.44)


def test_shares_of_a_teacher_that_gains_nothing_are_not_said(sample_results, sample_evaluations):
    """Students of such a teacher pass it, because they were trained for further steps."""
    front = sample_front(sample_results)
    by_label = {result.label: result.key for result in sample_results}
    [headline, *_] = findings(with_confidence(front, sample_evaluations))
    assert " keeps " in headline

    # The teacher answers an item or two more than r = 0.
    answers = {**sample_evaluations}
    nearly_as_good = next(r.key for r in sample_results if r.numbers["quality/accuracy"] == 0.4452)
    answers[by_label["r = 0 from scratch"]] = answers[nearly_as_good]
    measured = with_confidence(front, answers)
    [warning, *other_sentences] = findings(measured)
    assert warning == (
        "No gain of the teacher over r = 0 from scratch is shown: take r = 0 from scratch "
        "(6 of 24 NFE)."
    )
    text = " ".join(other_sentences)
    assert_names(text, "The teacher against r = 0 from scratch: no difference shown")
    assert_names(text, "The teacher against vanilla: better")
    assert not any("% of the teacher's" in sentence for sentence in [warning, *other_sentences])
    assert not any(" keeps " in sentence for sentence in [warning, *other_sentences])
    picked = pick_from_front(measured, PickRule(name="cheapest"))
    pick_text = describe_pick(measured, picked)
    assert_names(pick_text, "no gain of the teacher over r = 0 from scratch is shown")
    assert pick_text.endswith("take r = 0 from scratch")
    assert "% of the teacher's" not in pick_text

    # Separate errors of 1.2 points resolve nothing, so the values alone decide.
    for accuracy, is_beaten in ((0.4464, True), (0.4465, False), (0.45, False), (0.6, False)):
        results = [
            with_accuracy(r, accuracy) if r.label == "vanilla" else r for r in sample_results
        ]
        [first_sentence, *other_sentences] = findings(sample_front(results))
        assert (" keeps " in first_sentence) == is_beaten
        assert ("No gain of the teacher over vanilla is shown" in first_sentence) != is_beaten
        assert ("teacher against vanilla: worse" in " ".join(other_sentences)) == (accuracy == 0.6)
        # A model that was trained for longer is no measure of what corrections gain.
        tokens = {"vanilla": 2000, "teacher": 1000}
        results = [
            r.with_numbers("train", {"tokens": tokens[r.label]}) if r.label in tokens else r
            for r in results
        ]
        [first_sentence, *_] = findings(sample_front(results))
        assert " keeps " in first_sentence
    # A plain teacher has no corrections that could gain anything.
    teacher, *others = sample_results
    assert teacher.role == "teacher"
    plain_model = replace(teacher.model, method="vanilla", schedule=None)
    results = [teacher.model_copy(update={"model": plain_model})]
    results += [with_accuracy(r, 0.6) if r.label == "vanilla" else r for r in others]
    assert " keeps " in findings(sample_front(results))[0]
    # A lower loss is better.
    by_loss = FrontAxes(quality="quality/validation_loss")
    for loss, is_beaten in ((5.0, True), (4.0, False)):
        results = [
            r.with_numbers("quality", {"validation_loss": loss}) if r.role == "baseline" else r
            for r in sample_results
        ]
        [first_sentence, *_] = findings(sample_front(results, by_loss))
        assert (" keeps " in first_sentence) == is_beaten


def test_a_baseline_that_is_better_and_costs_no_more_is_said_of_a_pick(
    sample_results, sample_evaluations
):
    front = sample_front(sample_results)
    cheapest = pick_from_front(front, PickRule(name="cheapest"))
    assert better_baselines(front, cheapest) == [], "separate errors do not resolve it"
    front = with_confidence(front, sample_evaluations)
    cheapest = pick_from_front(front, PickRule(name="cheapest"))
    [zero] = better_baselines(front, cheapest)
    assert zero.startswith("r = 0 from scratch (accuracy 42.0 ± 1.1%) costs no more and is better")
    assert re.search(r"better, \+0\.\d points \(95% interval 0\.\d to \d\.\d, items", zero)
    # That vanilla is better is not sure of one among nine students, but of one that stands alone.
    alone = [r for r in sample_results if r.role != "trial" or r.key == cheapest.key]
    front = with_confidence(sample_front(alone), sample_evaluations)
    assert better_baselines(front, cheapest)[0].startswith("vanilla ")
    front = with_confidence(sample_front(sample_results), sample_evaluations)
    # The next better student costs more than they, but is better.
    assert better_baselines(front, front.picks["best"]) == []
    # One that costs more is no alternative.
    dearer = [
        r.with_numbers("cost", {"evaluations": 7}) if r.role == "baseline" else r
        for r in sample_results
    ]
    front = with_confidence(sample_front(dearer), sample_evaluations)
    cheapest = pick_from_front(front, PickRule(name="cheapest"))
    assert better_baselines(front, cheapest) == []


def test_claims_have_their_confidence(sample_results, front, sample_evaluations):
    unsure = front
    front = with_confidence(front, sample_evaluations)
    cheapest = front.cheapest_keeping(0.99)
    assert cheapest is not None
    unsure_ending = ", as far as 2,000 items can tell."
    # The cheapest is not certain enough; a costlier one is.
    sure = "Cheapest that keeps 99% with a confidence of 0.95 or more: "
    assert findings(front)[1].startswith(f"Confidence of {cheapest.label}: ")
    assert sure in findings(front)[2]
    # The full model has all of its own quality.
    assert "interval" not in describe_model(front, front.full)

    # A confidence of exactly 0.95 is enough.
    dearer = next(r for r in front.placed if r.is_candidate and r.cost > cheapest.cost)
    sentences = findings(keeping(front, {cheapest.key: 0.95}))
    assert sure not in " ".join(sentences)
    assert not sentences[0].endswith(unsure_ending)
    sentences = findings(keeping(front, {cheapest.key: 0.94, dearer.key: 0.95}))
    assert sure + dearer.label in " ".join(sentences)

    vanilla_key = next(r.key for r in sample_results if r.label == "vanilla")
    with_equal_answers = {**sample_evaluations, vanilla_key: sample_evaluations[cheapest.key]}
    sentences = findings(with_confidence(unsure, with_equal_answers))
    vanilla = next(s for s in sentences if s.startswith("vanilla against"))
    # Where all answers are equal, one item in 2,000 could be another one.
    assert vanilla.endswith(
        "no difference shown, +0.0 points (95% interval -0.3 to 0.3, items of one seed)."
    )
    tied = next(s for s in sentences if s.startswith("Tied with the teacher"))
    assert_names(tied, "3,3,3,3,3,3", "Holm", "11 comparisons")
    assert "0,0,0,0,0,0" not in tied


def test_a_teacher_with_a_source_beats_its_controls_or_is_called_worse(sample_results):
    def about_controls(source: float, continued: float) -> list[str]:
        names = {"vanilla": "source", "r = 0 from scratch": "source_continued"}
        accuracies = {"source": source, "source_continued": continued}
        results = []
        for result in sample_results:
            if name := names.get(result.label):
                control = result.model_copy(update={"role": name, "label": name})
                result = with_accuracy(control, accuracies[name])
            results.append(result)
        return [s for s in findings(sample_front(results)) if s.startswith("The teacher")]

    # The teacher has 44.65 %, and a difference below 3.35 points is not resolved.
    assert about_controls(0.3465, 0.3965) == [
        "The teacher against source: better, +10.0 points (95% interval 6.6 to 13.4, items of one "
        "seed).",
        "The teacher against source_continued: better, +5.0 points (95% interval 1.6 to 8.4, items "
        "of one seed).",
    ]
    source, continued = about_controls(0.43, 0.4965)
    assert "no difference shown, +1.7 points" in source
    assert "worse, -5.0 points" in continued
