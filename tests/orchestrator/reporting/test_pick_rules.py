"""Rules pick the model they say, or name the nearest."""

from __future__ import annotations

from typing import Any

import pytest
from refusals import refused
from sample_trials import keeping, sample_front

from orchestrator.reporting.findings import plain_choice
from orchestrator.reporting.front import Front, with_confidence
from orchestrator.reporting.pick_rules import PickRule, pick_from_front
from orchestrator.workspace.errors import UserError


@pytest.fixture
def front(sample_results) -> Front:
    return sample_front(sample_results)


def test_rules_pick_the_model_they_say(front):
    for name in ("best", "cheapest", "knee"):
        assert pick_from_front(front, PickRule(name=name)) is front.picks[name]
    costs = []
    for share in (0.9, 0.93, 0.97, 0.985, 0.99, 1.0):
        chosen = pick_from_front(front, PickRule(name="keep", demanded_share=share))
        costs.append(chosen.cost)
        rows_that_keep = [row for row in front.members if (front.share_of_full(row) or 0) >= share]
        assert chosen.cost == min(row.cost for row in rows_that_keep)
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]
    chosen = pick_from_front(front, PickRule(name="budget", budget=12))
    assert chosen.quality == max(r.quality for r in front.members if r.cost <= 12)

    aliases = {  # Names that MLflow takes.
        "keep-99": PickRule(name="keep"),
        "keep-98_5-sure-90": PickRule(name="keep", demanded_share=0.985, confidence=0.9),
        "budget-1_5e09": PickRule(name="budget", budget=1.5e9),
        "knee": PickRule(name="knee"),
    }
    assert [rule.alias for rule in aliases.values()] == [*aliases]

    judged = keeping(front, {row.key: row.cost / 24 for row in front.placed})
    chosen = pick_from_front(judged, PickRule(name="keep", confidence=0.5))
    assert chosen.cost == min(r.cost for r in judged.placed if r.is_candidate and r.cost >= 12)
    # The full model keeps all of itself, whatever the draws.
    assert pick_from_front(judged, PickRule(name="keep", confidence=0.999)).cost == 24


def test_a_rule_that_no_model_meets_names_the_nearest(front, sample_results):
    for rule, message in (
        (PickRule(name="keep", demanded_share=1.5), r"the best keeps 1\.00"),
        (PickRule(name="budget", budget=1), "the cheapest costs"),
    ):
        with pytest.raises(UserError, match=message):
            pick_from_front(front, rule)
    with refused(UserError, "accuracy"):
        pick_from_front(sample_front([]), PickRule(name="best"))
    with pytest.raises(UserError, match=r"no knee.*--keep SHARE"):
        pick_from_front(sample_front(sample_results[:1]), PickRule(name="knee"))
    wrong: list[dict[str, Any]] = [
        {"demanded_share": 0.0}, {"demanded_share": 99.0},
        {"confidence": 1.0}, {"confidence": -0.1},
    ]  # fmt: skip
    for numbers in wrong:
        with pytest.raises(UserError, match=r"got -?\d"):
            PickRule(name="keep", **numbers)


def test_where_corrections_gain_nothing_the_rule_takes_r_0_if_it_keeps_as_much(
    sample_results, sample_evaluations
):
    def picked(accuracy_of_r_0: float, **rule: float) -> str:
        """Return what is picked where r = 0 answers the first share of the items right."""
        results = []
        answers = {**sample_evaluations}
        for result in sample_results:
            if result.label == "r = 0 from scratch":
                same = accuracy_of_r_0 == teacher.numbers["quality/accuracy"]
                answers[result.key] = answers[teacher.key if same else result.key]
                result = result.with_numbers("quality", {"accuracy": accuracy_of_r_0})
            results.append(result)
        front = with_confidence(sample_front(results), answers)
        return pick_from_front(front, PickRule(name="keep", **rule)).label

    [teacher] = [result for result in sample_results if result.role == "teacher"]
    as_good = teacher.numbers["quality/accuracy"]
    assert picked(as_good) == "r = 0 from scratch"
    assert picked(as_good, confidence=0.9) == "r = 0 from scratch"
    assert picked(as_good, demanded_share=1.001) == "3,2,2,1,1,1", "it keeps less"
    assert picked(0.42) == "0,1,1,1,1,1", "the teacher gains"
    front = with_confidence(sample_front(sample_results), sample_evaluations)
    assert plain_choice(front) is None
