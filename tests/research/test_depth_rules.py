"""The rules of the depth study on made-up accuracies: each answer, and why there may be none."""

from __future__ import annotations

import pytest
from depth_rules import Measured, Verdict, verdicts

SEEDS = (2, 3, 4)
VANILLA = "vanilla, 2 layers"
DEEP = "vanilla, 8 layers"
NONE = "r = 0, 2 layers"
SINGLE = "r = 3, 2 layers"
LOOPED = "looped, r = 3, 2 layers"
GOOD = {VANILLA: 0.70, DEEP: 1.0, NONE: 0.65, SINGLE: 0.99, LOOPED: 0.95}
"""Corrections and repetitions pay. The gap is 30 points, so 85 % recover half of it."""
PAYS = f"does iteration pay in {SINGLE!r}"
LOOP_PAYS = f"does iteration pay in {LOOPED!r}"
INTERNALISED = f"are the corrections of {SINGLE!r} internalised"
WRONG_UNIT = "is the layer the wrong unit of iteration, L = 2, r = 3"


def measured(accuracies: dict[str, float], at_0: float = 0.5) -> dict[str, Measured]:
    return {
        name: Measured(
            accuracies=dict.fromkeys(SEEDS, accuracy),
            without_corrections={} if "vanilla" in name else dict.fromkeys(SEEDS, at_0),
        )
        for name, accuracy in accuracies.items()
    }


def judged(arms: dict[str, Measured], *variants: str) -> dict[str, Verdict]:
    answers = verdicts(arms, layers=[2], corrections=[3], seeds=SEEDS, variants=variants)
    return {verdict.question: verdict for verdict in answers}


@pytest.mark.parametrize(
    ("changes", "question", "answer"),
    [
        ({}, PAYS, True),
        ({}, LOOP_PAYS, True),
        ({SINGLE: 0.86}, PAYS, True),
        ({SINGLE: 0.84}, PAYS, False),  # Less than half of the gap.
        ({NONE: 0.90}, PAYS, False),  # 9 points over r = 0.
        ({NONE: 0.88}, PAYS, True),
        ({VANILLA: 0.81}, PAYS, None),  # The task does not need the depth.
        ({DEEP: 0.70}, PAYS, None),  # There is no gap.
        ({DEEP: None}, PAYS, None),
        ({NONE: None}, PAYS, None),
        ({SINGLE: None}, PAYS, None),
        ({NONE: 0.94}, LOOP_PAYS, True),  # Repetitions are compared with vanilla of two layers.
        ({LOOPED: 0.79}, LOOP_PAYS, False),
        ({SINGLE: 0.99, LOOPED: 0.95}, WRONG_UNIT, False),
        ({SINGLE: 0.75, LOOPED: 0.95}, WRONG_UNIT, True),
        ({SINGLE: 0.75, LOOPED: 0.75}, WRONG_UNIT, False),
        ({SINGLE: None, LOOPED: 0.95}, WRONG_UNIT, None),
        ({SINGLE: 0.75, LOOPED: None}, WRONG_UNIT, None),
        ({SINGLE: 0.99, LOOPED: None}, WRONG_UNIT, False),  # Whatever the loop does.
        ({SINGLE: None, LOOPED: 0.75}, WRONG_UNIT, False),
    ],
    ids=str,
)
def test_a_question_is_answered_by_its_conditions(changes, question, answer):
    accuracies = {**GOOD, **changes}
    known = {name: value for name, value in accuracies.items() if value is not None}
    assert judged(measured(known))[question].answer is answer


@pytest.mark.parametrize(("at_0", "is_internalised"), [(0.5, False), (0.975, False), (0.985, True)])
def test_corrections_are_internalised_if_the_weights_are_as_good_without(at_0, is_internalised):
    assert judged(measured(GOOD, at_0))[INTERNALISED].answer is is_internalised


def test_all_seeds_and_arms_must_be_there_and_variants_take_the_same_test():
    arms = measured(GOOD)
    arms[SINGLE] = Measured(accuracies={2: 0.99, 3: 0.99, 4: 0.7}, without_corrections={2: 0.99})
    verdict_of = judged(arms)
    assert verdict_of[PAYS].answer is False
    assert "2 of 3 seeds (seed 2: 99.0%, +34.0 points over 'r = 0, " in verdict_of[PAYS].text
    assert "cannot be decided; it was not read at r = 0 with seeds [3, 4]" in (
        verdict_of[INTERNALISED].text
    )
    arms[SINGLE] = Measured(accuracies={2: 0.99, 3: 0.99}, without_corrections={})
    assert "'r = 3, 2 layers' lacks seeds [4]" in judged(arms)[PAYS].text
    del arms[DEEP]
    assert "'vanilla, 8 layers' is missing" in judged(arms)[LOOP_PAYS].text
    name = f"{SINGLE}, two stages"
    verdict_of = judged(measured({**GOOD, name: 0.8}), ", two stages", ", learned damping")
    assert verdict_of[f"does iteration pay in {name!r}"].answer is False
    assert len(verdict_of) == 5
