"""The rules of the depth study on made-up accuracies: each answer, and why there may be none."""

from __future__ import annotations

import pytest
from depth_rules import Measured, Verdict, verdicts

SEEDS = (2, 3, 4)
GOOD = {
    "vanilla, 2 layers": 0.70,
    "vanilla, 8 layers": 1.0,
    "r = 0, 2 layers": 0.65,
    "r = 3, 2 layers": 0.99,
    "looped, r = 3, 2 layers": 0.95,
}
"""Corrections and repetitions pay. The gap is 30 points, so 85 % recover half of it."""


def measured(accuracies: dict[str, float], at_0: float = 0.5) -> dict[str, Measured]:
    return {
        name: Measured(
            accuracies=dict.fromkeys(SEEDS, accuracy),
            without_corrections={} if "vanilla" in name else dict.fromkeys(SEEDS, at_0),
        )
        for name, accuracy in accuracies.items()
    }


def judged(arms: dict[str, Measured], *variants: str) -> dict[str, Verdict]:
    found = verdicts(arms, layers=[2], corrections=[3], seeds=SEEDS, variants=variants)
    return {verdict.question: verdict for verdict in found}


PAYS, LOOP_PAYS = (
    "does iteration pay in 'r = 3, 2 layers'",
    "does iteration pay in 'looped, r = 3, 2 layers'",
)
INTERNALISED = "are the corrections of 'r = 3, 2 layers' internalised"
WRONG_UNIT = "is the layer the wrong unit of iteration, L = 2, r = 3"


def answers(**changes: float | None) -> dict[str, bool | None]:
    accuracies = {**GOOD, **changes}
    known = {name: value for name, value in accuracies.items() if value is not None}
    return {question: verdict.answer for question, verdict in judged(measured(known)).items()}


def test_corrections_and_repetitions_that_pay() -> None:
    assert answers() == {PAYS: True, LOOP_PAYS: True, WRONG_UNIT: False, INTERNALISED: False}


@pytest.mark.parametrize(
    ("changes", "pays"),
    [
        ({"r = 3, 2 layers": 0.86}, True),
        ({"r = 3, 2 layers": 0.84}, False),  # Less than half of the gap.
        ({"r = 0, 2 layers": 0.90}, False),  # 9 points over r = 0.
        ({"r = 0, 2 layers": 0.88}, True),
        ({"vanilla, 2 layers": 0.81}, None),  # The task does not need the depth.
        ({"vanilla, 8 layers": 0.70}, None),  # There is no gap.
        ({"vanilla, 8 layers": None}, None),
        ({"r = 0, 2 layers": None}, None),
        ({"r = 3, 2 layers": None}, None),
    ],
    ids=str,
)
def test_both_conditions_are_needed(changes: dict[str, float | None], pays: bool | None) -> None:
    assert answers(**changes)[PAYS] is pays


def test_repetitions_are_compared_with_vanilla_of_as_many_layers() -> None:
    assert answers(**{"r = 0, 2 layers": 0.94})[LOOP_PAYS] is True
    assert answers(**{"looped, r = 3, 2 layers": 0.79})[LOOP_PAYS] is False


@pytest.mark.parametrize(
    ("single", "whole", "is_wrong"),
    [
        (0.99, 0.95, False),
        (0.75, 0.95, True),
        (0.75, 0.75, False),
        (None, 0.95, None),
        (0.75, None, None),
        (0.99, None, False),  # Whatever the loop does.
        (None, 0.75, False),
    ],
)
def test_the_layer_is_the_wrong_unit_if_only_the_whole_stack_pays(
    single: float | None, whole: float | None, is_wrong: bool | None
) -> None:
    changes = {"r = 3, 2 layers": single, "looped, r = 3, 2 layers": whole}
    assert answers(**changes)[WRONG_UNIT] is is_wrong


@pytest.mark.parametrize(("at_0", "is_internalised"), [(0.5, False), (0.975, False), (0.985, True)])
def test_corrections_are_internalised_if_the_weights_are_as_good_without(
    at_0: float, is_internalised: bool
) -> None:
    assert judged(measured(GOOD, at_0))[INTERNALISED].answer is is_internalised


def test_all_seeds_must_agree_and_be_there() -> None:
    arms = measured(GOOD)
    name = "r = 3, 2 layers"
    arms[name] = Measured(accuracies={2: 0.99, 3: 0.99, 4: 0.7}, without_corrections={2: 0.99})
    found = judged(arms)
    assert found[PAYS].answer is False
    assert "in 2 of 3 seeds (seed 2: 99.0%, +34.0 points over 'r = 0, 2 layers', " in (
        found[PAYS].text
    )
    assert found[INTERNALISED].text == (
        f"{INTERNALISED}: cannot be decided; it was not read at r = 0 with seeds [3, 4]"
    )
    arms[name] = Measured(accuracies={2: 0.99, 3: 0.99}, without_corrections={})
    assert "'r = 3, 2 layers' lacks seeds [4]" in judged(arms)[PAYS].text


def test_a_missing_arm_is_named() -> None:
    known = {name: value for name, value in GOOD.items() if "8" not in name}
    assert judged(measured(known))[PAYS].text == (
        f"{PAYS}: cannot be decided; 'vanilla, 8 layers' is missing"
    )


def test_variants_take_the_same_test_if_they_ran() -> None:
    name = "r = 3, 2 layers, two stages"
    question = f"does iteration pay in {name!r}"
    found = judged(measured({**GOOD, name: 0.8}), ", two stages", ", learned damping")
    assert found[question].answer is False
    assert len(found) == 5
