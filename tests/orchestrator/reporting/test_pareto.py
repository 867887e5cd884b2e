"""The front against its definition, and its picks against small cases."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_trials import sample_front, sample_trial

from orchestrator.records.trial import Role, Trial
from orchestrator.reporting.findings import findings
from orchestrator.reporting.front_axes import FrontAxes
from orchestrator.reporting.pareto import Front


def result(cost: float, accuracy: float, role: Role = "trial", key: str = "") -> Trial:
    return sample_trial(
        key=key or f"{role}-{cost}-{accuracy}",
        role=role,
        method="iiet",
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
    return [(point.cost, point.quality) for point in front.members]


def test_members_are_not_dominated() -> None:
    front = front_of((6, 0.30), (8, 0.40), (10, 0.39), (12, 0.45), (24, 0.45))
    assert places(front) == [(6, 0.30), (8, 0.40), (12, 0.45)]


numbers = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(numbers, numbers), max_size=12))
def test_front_equals_its_definition(points: list[tuple[float, float]]) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    expected = sorted(p for p in points if not any(beats(other, p) for other in points))
    assert sorted(places(front_of(*points))) == expected


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12))
def test_a_loss_gives_the_same_front_as_the_accuracy_it_mirrors(
    points: list[tuple[float, float]],
) -> None:
    results = [result(*point, key=str(i)) for i, point in enumerate(points)]
    by_loss = sample_front(results, FrontAxes(quality="quality/validation_loss"))
    by_accuracy = sample_front(results)
    assert {p.result.key for p in by_loss.members} == {p.result.key for p in by_accuracy.members}


def test_a_baseline_beside_a_teacher_takes_no_trial_off_the_front() -> None:
    results = [
        result(6, 0.30, key="none"),
        result(24, 0.50, "teacher", key="full"),
        result(6, 0.40, "baseline", key="vanilla"),
    ]
    front = sample_front(results)
    (vanilla,) = (p for p in front.points if p.is_baseline)
    assert not vanilla.on_front
    assert {p.result.key for p in front.members} == {"none", "full"}
    assert [p.result.key for p in front.members_beaten_by(vanilla)] == ["none"]


def test_where_all_are_trained_from_scratch_a_baseline_competes() -> None:
    vanilla = result(6, 0.40, "baseline", key="vanilla")
    results = [result(6, 0.30, key="none"), result(24, 0.50, key="full"), vanilla]
    front = sample_front(results)
    assert [p.result.key for p in front.members] == ["vanilla", "full"]
    assert (front.cheapest and front.cheapest.result, front.full and front.full.cost) == (
        vanilla,
        24,
    )
    assert front.members_beaten_by(front.members[0]) == ()
    told = findings(front)
    assert "vanilla (accuracy 40.0 ± 1.0%) is worse than full by 10" in " ".join(told)


def test_methods_without_corrections_have_a_front_of_their_own() -> None:
    methods = [result(6, 0.4, "baseline", key="vanilla"), result(18, 0.5, "baseline", key="rk2")]
    front = sample_front(methods)
    assert len(front.members) == 2
    assert front.full is not None
    assert front.full.result.key == "rk2"
    (against,) = (text for text in findings(front) if text.startswith("vanilla ("))
    assert "is worse than rk2" in against


def test_picks() -> None:
    front = front_of((6, 0.30), (8, 0.46), (12, 0.49), (24, 0.50), teacher=(24, 0.495))
    assert front.best is not None
    assert front.cheapest is not None
    assert front.knee is not None
    assert (front.best.cost, front.cheapest.cost, front.knee.cost) == (24, 6, 8)
    assert front.full is not None
    assert front.full.result.role == "teacher"
    assert front.share(front.full) == 1.0
    kept = front.cheapest_keeping(0.98)
    assert kept is not None
    assert kept.cost == 12
    assert front.cheapest_keeping(1.5) is None


def test_a_straight_front_has_no_knee() -> None:
    assert front_of((1, 0.1), (2, 0.2), (3, 0.3)).knee is None
    assert front_of((1, 0.1)).knee is None
    assert front_of().knee is None


def test_hypervolume_is_the_kept_share_averaged_over_budgets() -> None:
    # Half of the accuracy from a quarter of the cost on, all of it from three quarters on.
    front = front_of((6, 0.25), (18, 0.5), teacher=(24, 0.5))
    assert front.hypervolume == pytest.approx(0.5 * 0.5 + 1.0 * 0.25)
    assert front.hypervolume_box is not None
    assert (
        front.hypervolume_box.cost,
        front.hypervolume_box.quality,
        front.hypervolume_box.full_quality,
    ) == (24, 0.0, 0.5)
    assert front_of().hypervolume is None
    # A baseline is placed, and no model that competes.
    lacking = sample_trial(key="x", role="teacher", method="iiet", cost={"evaluations": 24})
    assert sample_front([lacking, result(6, 0.3, "baseline")]).hypervolume is None


def test_a_better_trial_never_lowers_the_hypervolume() -> None:
    before = front_of((6, 0.25), (18, 0.5), teacher=(24, 0.5)).hypervolume
    after = front_of((6, 0.25), (12, 0.4), (18, 0.5), teacher=(24, 0.5)).hypervolume
    assert before is not None
    assert after is not None
    assert after > before


def test_hypervolume_of_a_loss_counts_from_the_worst() -> None:
    results = [result(6, 0.3), result(12, 0.5), result(24, 0.5, "teacher")]
    front = sample_front(results, FrontAxes(quality="quality/validation_loss"))
    assert front.hypervolume_box is not None
    assert front.hypervolume_box.quality == pytest.approx(0.7)
    assert front.hypervolume == pytest.approx(0.5)
    assert front.share(front.members[0]) == pytest.approx(0.5 / 0.7)


def test_results_without_both_metrics_are_unmeasured() -> None:
    lacking = sample_trial(key="x", role="trial", method="iiet", cost={"evaluations": 3})
    unsure = result(3, math.nan)
    front = sample_front([lacking, unsure, result(6, 0.5)])
    assert {r.key for r in front.unmeasured} == {"x", unsure.key}
    assert places(front) == [(6, 0.5)]
