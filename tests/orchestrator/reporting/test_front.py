"""The front against its definition, its picks against small cases, and how sure its places are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from laws import examples
from refusals import assert_names
from sample_trials import sample_front, sample_trial
from scipy.stats import t

from orchestrator.records.evaluation import EvaluationResult, TaskResult, standard_error
from orchestrator.records.trial import Role, Trial
from orchestrator.reporting.charts import front_chart
from orchestrator.reporting.findings import findings
from orchestrator.reporting.front import (
    Front,
    FrontAxes,
    with_confidence,
)
from orchestrator.reporting.results import model_results, with_overhead
from orchestrator.reporting.statistics import Interval, corrected, pair_scores

LOSS = FrontAxes(quality="quality/validation_loss")
NUM_ITEMS = 400


def result(cost: float, accuracy: float, role: Role = "trial", key: str = "") -> Trial:
    return sample_trial(
        key=key or f"{role}-{cost}-{accuracy}",
        role=role,
        label=key,
        cost={"evaluations": cost},
        quality={"accuracy": accuracy, "accuracy_stderr": 0.01, "validation_loss": 1 - accuracy},
    )


def front_of(*points: tuple[float, float], teacher: tuple[float, float] | None = None) -> Front:
    results = [result(*point, key=f"{n}") for n, point in enumerate(points)]
    if teacher:
        results.append(result(*teacher, role="teacher"))
    return sample_front(results)


def places(front: Front) -> list[tuple[float, float]]:
    return [(row.cost, row.quality) for row in front.members]


numbers = st.integers(0, 6).map(float)


@settings(max_examples=examples(20))
@given(st.lists(st.tuples(numbers, numbers), max_size=12))
@example([(1.0, 1.0), (1.0, 1.0), (2.0, 0.0)])  # Of equal models none beats the other.
def test_the_front_equals_its_definition_also_on_a_loss(points):
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    front = front_of(*points)
    assert sorted(places(front)) == sorted(
        p for p in points if not any(beats(other, p) for other in points)
    )
    by_loss = sample_front([result(*p, key=f"{n}") for n, p in enumerate(points)], LOSS)
    assert {row.key for row in by_loss.members} == {row.key for row in front.members}


def test_baselines_compete_only_where_there_is_no_teacher():
    vanilla = result(6, 0.40, "baseline", key="vanilla")
    front = sample_front(
        [result(6, 0.30, key="none"), result(24, 0.50, "teacher", key="full"), vanilla]
    )
    (placed,) = (row for row in front.placed if row.role == "baseline")
    assert not placed.on_front
    assert {row.key for row in front.members} == {"none", "full"}
    assert [row.key for row in front.members_beaten_by(placed)] == ["none"]

    front = sample_front([result(6, 0.30, key="none"), result(24, 0.50, key="full"), vanilla])
    assert [row.key for row in front.members] == ["vanilla", "full"]
    assert front.full
    assert front.full.cost == 24
    assert front.members_beaten_by(front.members[0]) == []
    assert_names(" ".join(findings(front)), "vanilla against full: worse, -10")

    front = sample_front([vanilla, result(18, 0.5, "baseline", key="rk2")])
    assert front.full
    assert (len(front.members), front.full.key) == (2, "rk2")
    assert "against rk2: worse" in " ".join(findings(front))


def test_a_baseline_of_equal_quality_or_equal_cost_beats_a_member():
    teacher = result(24, 0.50, "teacher", key="full")
    places = {"cheaper": (5, 0.30), "better": (6, 0.31), "equal": (6, 0.30), "dearer": (7, 0.30)}
    for name, place in places.items():
        baseline = result(*place, "baseline", key=name)
        front = sample_front([result(6, 0.30, key="none"), teacher, baseline])
        (placed,) = (row for row in front.placed if row.role == "baseline")
        beaten = [row.key for row in front.members_beaten_by(placed)]
        assert beaten == (["none"] if name in ("cheaper", "better") else []), name


def test_picks():
    front = front_of((6, 0.30), (8, 0.46), (12, 0.49), (24, 0.50), teacher=(24, 0.495))
    assert {n: row.cost for n, row in front.picks.items()} == {
        "knee": 8, "best": 24, "cheapest": 6,
    }  # fmt: skip
    assert front.full
    assert (front.full.role, front.share_of_full(front.full)) == ("teacher", 1.0)
    cheapest = front.cheapest_keeping(0.98)
    assert cheapest
    assert cheapest.cost == 12
    assert front.cheapest_keeping(1.5) is None
    for straight in (((1, 0.1), (2, 0.2), (3, 0.3)), ((1, 0.1),), ()):
        assert "knee" not in front_of(*straight).picks
    # Results without both metrics are unmeasured.
    lacking = sample_trial(key="x", cost={"evaluations": 3})
    unsure = result(3, math.nan)
    front = sample_front([lacking, unsure, result(6, 0.5)])
    assert {row.key for row in front.unmeasured} == {"x", unsure.key}
    assert places(front) == [(6, 0.5)]


@pytest.mark.parametrize(("accuracy", "is_named"), [(0.49, False), (0.4951, True)])
def test_a_knee_that_keeps_less_than_demanded_is_not_named(accuracy, is_named):
    front = front_of((6, 0.30), (8, accuracy), (24, 0.50), teacher=(24, 0.50))
    knee = front.picks["knee"]
    assert knee.cost == 8, "it can be picked"
    assert ("knee" in front.verdict(knee)) == is_named
    assert not any("knee" in sentence for sentence in findings(front))
    names = front_chart(front)["datasets"]["names"]
    assert any(name["name"] == f"{knee.label} (knee)" for name in names) == is_named


def test_the_share_of_a_loss_is_inverted():
    front = sample_front([result(6, 0.3), result(12, 0.5), result(24, 0.5, "teacher")], LOSS)
    assert front.share_of_full(front.members[0]) == pytest.approx(0.5 / 0.7)


def seed_of(number: int, accuracy: float, group: str | None = "r = 1") -> Trial:
    return sample_trial(
        key=f"key-{group}-{number}",
        schedule=(1, 1),
        label=f"{group}, seed {number}",
        cost={"evaluations": 4.0},
        quality={"accuracy": accuracy, "accuracy_stderr": 0.03, "validation_loss": 4 + accuracy},
        checkpoint=f"/runs/{number}",
        seed=number,
        group=group,
    )


def test_the_error_of_seeds_combines_their_spread_and_that_over_items():
    (model,) = model_results([seed_of(0, 0.30), seed_of(1, 0.32), seed_of(2, 0.37)])
    mean = model.trial
    assert (mean.label, mean.numbers["train/seeds"], mean.checkpoint) == ("r = 1", 3, "/runs/0")
    assert mean.numbers["quality/accuracy"] == pytest.approx(0.33)
    over_seeds = (0.03**2 + 0.01**2 + 0.04**2) / 2 / 3
    assert mean.numbers["quality/accuracy_stderr"] == pytest.approx(math.sqrt(over_seeds + 0.03**2))
    assert mean.numbers["quality/validation_loss_stderr"] == pytest.approx(math.sqrt(over_seeds))
    assert [seed.seed for seed in model.seeds] == [0, 1, 2]
    assert model.number("quality/accuracy") == mean.numbers["quality/accuracy"]
    (tie,) = model_results([seed_of(0, 0.7), seed_of(1, 0.7885), seed_of(2, 0.73)])
    assert tie.number("quality/accuracy") == 0.7395, "not 0.7394999999999999"
    alone = seed_of(0, 0.3)
    of_no_group = seed_of(0, 0.4, None).model_copy(update={"key": "other"})
    models = model_results([alone, of_no_group])
    assert [model.trial for model in models] == [alone, of_no_group]
    assert [model.seeds for model in models] == [(alone,), (of_no_group,)]


def test_overhead_is_what_a_model_costs_beyond_vanilla_of_its_shape():
    def costing(ms: float | None, schedule: tuple[int, ...], **more: Any) -> Trial:
        cost = {"evaluations": 2 + sum(schedule), "decode_ms_per_token": ms}
        return sample_trial(schedule=schedule, cost=cost, **more)

    vanilla = costing(1.0, (0, 0), key="v", method="vanilla", role="baseline", checkpoint="v")
    teacher = costing(3.0, (2, 2), key="t", role="teacher", checkpoint="t")
    pruned = costing(1.8, (1, 0), key="p", parent="w", checkpoint="t")
    trained = costing(None, (0, 0), key="s", parent="w", checkpoint="s", is_elastic=True)
    of_another_shape = costing(5.0, (3, 3, 3), key="o", checkpoint="o")
    models = model_results([vanilla, teacher, pruned, trained, of_another_shape])
    expected = {
        "cost/overhead_evaluations": [0, 4, 1, 0, 8],
        "cost/overhead_share": [None, None, 0.25, 0.0, None],
        "cost/overhead_ms_per_token": [0, 2, 0.8, None, None],
        "cost/overhead_ms_share": [None, None, 0.4, None, None],
    }
    for name, values in expected.items():
        for model, value in zip(models, values, strict=True):
            assert model.number(name) == (None if value is None else pytest.approx(value))
    # Without vanilla, its evaluations alone are known; a second sweep on the front may bring it.
    alone = model_results([teacher, pruned])
    assert [name for name in expected if name in alone[1].numbers] == [*expected][:2]
    with_vanilla = with_overhead([*alone, *model_results([vanilla])])
    overheads = [model.number("cost/overhead_ms_per_token") for model in with_vanilla]
    assert overheads == pytest.approx([2, 0.8, 0])


# Confidence


def task(name: str, right: Sequence[float], items: Sequence[str] | None = None) -> TaskResult:
    values = [float(v) for v in right]
    metrics = {"acc": float(np.mean(values)), "acc_stderr": standard_error("mean", values) or 0.0}
    names = list(items) if items else [f"{name}-{n}" for n in range(len(values))]
    return TaskResult(
        name=name, version="1", num_items=len(values), metrics=metrics, items=names,
        values={"acc": values},
    )  # fmt: skip


def bits_task(bits: float) -> TaskResult:
    pairs = [[-bits * math.log(2) * 100 * (1 + n % 3), 100.0 * (1 + n % 3)] for n in range(40)]
    return TaskResult(
        name="bits_per_byte", version="1", num_items=40, metrics={"bits_per_byte": bits},
        items=[f"document-{n}" for n in range(40)], values={"bits_per_byte": pairs},
    )  # fmt: skip


def answers(share: float) -> list[float]:
    """Right answers on the first items: a better model is right wherever a worse one is."""
    return [float(n < share * NUM_ITEMS) for n in range(NUM_ITEMS)]


def evaluation(*tasks: TaskResult, **groups: tuple[str, ...]) -> EvaluationResult:
    return EvaluationResult(results={t.name: t for t in tasks}, groups=groups)


Points = dict[str, tuple[Role, float, EvaluationResult]]


def sure_front(points: Points, axes: FrontAxes | None = None, share: float = 0.99) -> Front:
    results = [
        sample_trial(
            key=name, role=role, label=name, cost={"evaluations": cost}, quality=evaluated.quality()
        )
        for name, (role, cost, evaluated) in points.items()
    ]
    runs = {name: evaluated for name, (_, _, evaluated) in points.items()}
    front = sample_front(results, axes)
    return with_confidence(front, runs, demanded_share=share)


def at(front: Front, key: str, name: str) -> float | None:
    return next(model for model in front.placed if model.key == key).number(f"paired/{name}")


def against(front: Front, key: str, reference: str, measured: str = "quality/accuracy") -> Interval:
    return front.intervals[key, measured, reference]


@pytest.fixture
def front() -> Front:
    def measured(share: float, bits: float) -> EvaluationResult:
        return evaluation(task("words", answers(share)), bits_task(bits))

    return sure_front(
        {
            "teacher": ("teacher", 24.0, measured(0.500, 2.0)),
            "close": ("trial", 12.0, measured(0.4975, 2.01)),
            "poor": ("trial", 6.0, measured(0.25, 2.5)),
            "worse": ("trial", 10.0, measured(0.20, 2.6)),
            "vanilla": ("baseline", 6.0, measured(0.30, 2.4)),
        }
    )


def test_scores_equal_those_of_the_evaluation():
    tasks = [task(n, answers(s)) for n, s in (("a", 0.3), ("b", 0.5), ("c", 0.9))]
    evaluated = evaluation(*tasks, bits_task(2.2), both=("a", "b"))
    paired = pair_scores({"one": [evaluated], "two": [evaluated]})
    assert paired is not None
    expected = {"quality/accuracy": 0.65, "quality/bits_per_byte": 2.2, "quality/c/acc": 0.9}
    for name, value in expected.items():
        scores = paired.quality(name)
        assert scores is not None
        assert scores.observed == pytest.approx([value] * 2)
    of_words = len(tasks[0].items)
    of_bits = 40
    counts = [paired.num_items(name) for name in expected]
    assert counts == [3 * of_words, of_bits, of_words]
    assert evaluated.accuracy == pytest.approx(0.65)
    assert paired.quality("quality/validation_loss") is None


def test_items_are_matched_by_hash_and_unmatched_ones_counted():
    evaluated = evaluation(task("words", [1, 0, 1, 0], items=["a", "b", "c", "a"]))
    evaluated_elsewhere = evaluation(
        task("words", [0, 1, 1], items=["c", "a", "x"]), task("more", [1, 1], items=["p", "q"])
    )
    paired = pair_scores({"one": [evaluated], "other": [evaluated_elsewhere]})
    assert paired is not None
    # Shared: `c` and the first `a`. Left out: `b`, the second `a`, `x`, and all of `more`.
    assert paired.items["words"].values.tolist() == [[1.0, 1.0], [1.0, 0.0]]
    assert (paired.num_items("quality/accuracy"), dict(paired.left_out)) == (
        2,
        {"words": 3, "more": 2},
    )
    assert pair_scores({"one": [evaluated], "other": [evaluation(task("more", [1.0]))]}) is None


def test_a_score_depends_on_no_other_task_and_its_error_includes_the_seeds():
    def error(*tasks: TaskResult) -> float:
        paired = pair_scores({"one": [evaluation(*tasks)]})
        assert paired is not None
        return paired.scores["words"].score(0).error

    words = task("words", answers(0.5))
    assert error(words) == error(task("other", answers(0.2)), words)

    seeds = [evaluation(task("words", answers(share))) for share in (0.4, 0.6)]
    paired = pair_scores({"several": seeds, "one": seeds[:1]})
    assert paired is not None
    scores = paired.scores["words"]
    assert scores.observed == pytest.approx([0.5, 0.4])
    assert scores.score(0).error > 2 * scores.score(1).error
    assert scores.score(0).over == "seeds and items"
    assert scores.score(1).over == "items of one seed"


def test_confidences_follow_the_answers(front):
    for name, share in (("poor", 1.0), ("worse", 0.0), ("close", 1.0)):
        assert at(front, name, "confidence_on_front") == pytest.approx(share, abs=1e-3)
    assert at(front, "poor", "confidence_keeps_99") == 0.0
    assert at(front, "teacher", "confidence_keeps_99") == 1.0
    assert at(front, "teacher", "share_of_full_low") == 1.0
    # `close` lacks one item that the teacher has, and a difference counts one more of each.
    assert at(front, "close", "share_of_full") == pytest.approx(0.995)
    difference = against(front, "close", "teacher")
    assert difference.value == at(front, "close", "vs_teacher") == pytest.approx(-0.0025)
    error = math.sqrt(1 + 2) / NUM_ITEMS
    assert difference.high == pytest.approx(-0.0025 + 1.966 * error, abs=1e-5)
    # The teacher leads by one item, of three models that something cheaper could beat.
    assert at(front, "teacher", "confidence_on_front") == pytest.approx(
        corrected({"teacher": t.cdf(0.0025 / error, NUM_ITEMS - 1), "worse": 0, "close": 1})[
            "teacher"
        ],
        abs=1e-3,
    )
    # To keep 99% allows to lose two items of 400; one is lost, and one more is counted.
    raw = t.cdf((2 - 1 - 0.99) / math.sqrt(1 + 1 + 0.99**2), NUM_ITEMS - 1)
    keeps = corrected({"close": raw, "poor": 0, "worse": 0, "vanilla": 0})["close"]
    assert at(front, "close", "confidence_keeps_99") == pytest.approx(keeps, abs=0.01)
    # Models are compared with baselines, which have no place.
    assert at(front, "vanilla", "confidence_on_front") is None
    compared = [o for key, name, o in front.intervals if (key, name) == ("close", "words")]
    assert compared == ["", "teacher", "vanilla"]
    assert against(front, "close", "vanilla").excludes_zero
    assert at(front, "close", "bits_per_byte/vs_vanilla") == pytest.approx(-0.39)


def test_models_whose_names_differ_in_signs_alone_are_compared_apart():
    def of_words(share: float) -> EvaluationResult:
        return evaluation(task("words", answers(share)))

    front = sure_front(
        {
            "teacher": ("teacher", 24.0, of_words(0.5)),
            "my-run": ("baseline", 5.0, of_words(0.4)),
            "my_run": ("baseline", 6.0, of_words(0.3)),
        }
    )
    assert at(front, "teacher", "vs_my_run") == pytest.approx(0.1, abs=0.01)
    assert at(front, "teacher", "vs_my_run_2") == pytest.approx(0.2, abs=0.01)


def test_the_share_of_a_loss_is_inverted_and_a_twin_is_not_sure_to_keep_all():
    points: Points = {
        "teacher": ("teacher", 24.0, evaluation(bits_task(2.0))),
        "close": ("trial", 12.0, evaluation(bits_task(2.01))),
        "poor": ("trial", 6.0, evaluation(bits_task(2.5))),
    }
    front = sure_front(points, FrontAxes(quality="quality/bits_per_byte"))
    assert at(front, "close", "share_of_full") == pytest.approx(2.0 / 2.01)
    for name, keeps in (("close", 1.0), ("poor", 0.0)):
        assert at(front, name, "confidence_keeps_99") == keeps
        assert at(front, name, "confidence_on_front") == 1.0
    answered = evaluation(bits_task(2.0))
    points = {"teacher": ("teacher", 24.0, answered), "twin": ("trial", 12.0, answered)}
    in_bits = sure_front(points, FrontAxes(quality="quality/bits_per_byte"), share=1.0)
    assert at(in_bits, "twin", "confidence_keeps_100") == 0.5
    answered = evaluation(task("words", answers(0.5)))
    points = {"teacher": ("teacher", 24.0, answered), "twin": ("trial", 12.0, answered)}
    # No item tells them apart. At an accuracy of a half, 0.5 % of the items may be lost, of which
    # none is lost in 400 with a chance of 0.995^400.
    keeps = at(sure_front(points), "twin", "confidence_keeps_99")
    assert keeps == pytest.approx(1 - 0.995**400, abs=0.12)


def test_a_result_without_items_has_no_confidence():
    words = {name: evaluation(task("words", answers(s))) for name, s in (("a", 0.5), ("b", 0.4))}
    results = [
        sample_trial(key=name, cost={"evaluations": n}, quality={"accuracy": 0.4})
        for n, name in enumerate(("a", "b", "lost"))
    ]
    front = sample_front(results)
    assert with_confidence(front, {}).basis is None
    partly = with_confidence(front, words)
    assert not any(key == "lost" for key, _, _ in partly.intervals)
    # The lost one competes for the front and is the full model: neither can be told.
    for name in ("confidence_on_front", "confidence_keeps_99", "share_of_full"):
        assert at(partly, "a", name) is None
