"""A rule picks one model of a front, or reports why none meets it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sample_trials import sample_front

from orchestrator.records.trial import Trial
from orchestrator.reporting.pareto import Front
from orchestrator.reporting.pick_rules import PickRule, pick_from_front
from orchestrator.reporting.statistics import Confidence
from orchestrator.workspace.errors import UserError


@pytest.fixture
def front(sample_results: list[Trial]) -> Front:
    return sample_front(sample_results)


def test_best_cheapest_and_knee(front: Front) -> None:
    assert pick_from_front(front, PickRule(name="best")) is front.best
    assert pick_from_front(front, PickRule(name="cheapest")) is front.cheapest
    assert pick_from_front(front, PickRule(name="knee")) is front.knee


@pytest.mark.parametrize("share", [0.9, 0.97, 0.99, 1.0])
def test_keep_is_the_cheapest_that_keeps(front: Front, share: float) -> None:
    chosen = pick_from_front(front, PickRule(name="keep", share=share))
    keeping = [p for p in front.members if (front.share(p) or 0) >= share]
    assert chosen.cost == min(p.cost for p in keeping)


def test_keeping_more_costs_more(front: Front) -> None:
    costs = [
        pick_from_front(front, PickRule(name="keep", share=s)).cost
        for s in (0.93, 0.96, 0.985, 1.0)
    ]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


def test_budget_is_the_best_within(front: Front) -> None:
    chosen = pick_from_front(front, PickRule(name="budget", budget=12))
    within = [p for p in front.members if p.cost <= 12]
    assert chosen.quality == max(p.quality for p in within)
    with pytest.raises(UserError, match="the cheapest costs"):
        pick_from_front(front, PickRule(name="budget", budget=1))


def test_keep_with_confidence(front: Front) -> None:
    def sure(point, keeps):  # type: ignore[no-untyped-def]
        return replace(
            point,
            confidence=Confidence(overall=None, tasks={}, share=None, keeps=keeps, on_front=None),
        )

    placed = tuple(sure(p, p.cost / 24) for p in front.points)
    judged = replace(front, points=placed)
    chosen = pick_from_front(judged, PickRule(name="keep", confidence=0.5))
    assert chosen.cost == min(p.cost for p in judged.points if p.is_candidate and p.cost >= 12)
    # The full model keeps all of itself, whatever the draws.
    assert pick_from_front(judged, PickRule(name="keep", confidence=0.999)).cost == 24


def test_a_rule_that_no_model_meets_names_the_nearest(front: Front) -> None:
    with pytest.raises(UserError, match=r"the best keeps 1\.00"):
        pick_from_front(front, PickRule(name="keep", share=1.5))
    with pytest.raises(UserError, match="measured in accuracy"):
        pick_from_front(sample_front([]), PickRule(name="best"))


@pytest.mark.parametrize(
    "numbers", [{"share": 0.0}, {"share": 99.0}, {"confidence": 1.0}, {"confidence": -0.1}]
)
def test_impossible_numbers_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"got -?\d"):
        PickRule(name="keep", **numbers)


@pytest.mark.parametrize(
    ("rule", "alias"),
    [
        (PickRule(name="keep"), "keep-99"),
        (PickRule(name="keep", share=0.985, confidence=0.9), "keep-98_5-sure-90"),
        (PickRule(name="budget", budget=1.5e9), "budget-1_5e09"),
        (PickRule(name="knee"), "knee"),
    ],
)
def test_aliases_are_names_that_mlflow_takes(rule: PickRule, alias: str) -> None:
    assert rule.alias == alias
