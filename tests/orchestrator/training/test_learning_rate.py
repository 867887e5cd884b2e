from __future__ import annotations

import itertools

import pytest

from orchestrator.settings import TrainingSettings
from orchestrator.training.schedules import learning_rate_at

RECIPE = {
    "num_steps": 100,
    "warmup_steps": 10,
    "learning_rate": 1.0,
    "final_learning_rate_fraction": 0.1,
}


def rates(**changes: object) -> list[float]:
    recipe = TrainingSettings(**{**RECIPE, **changes})
    return [learning_rate_at(step, recipe) for step in range(recipe.num_steps)]


@pytest.mark.parametrize("decay", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(decay: str) -> None:
    assert rates(decay=decay)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


@pytest.mark.parametrize("decay", ["cosine", "wsd"])
def test_last_step_has_the_final_rate(decay: str) -> None:
    assert rates(decay=decay)[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("decay", ["cosine", "wsd", "constant"])
def test_never_rises_after_the_warm_up(decay: str) -> None:
    after = rates(decay=decay)[10:]
    assert all(later <= earlier for earlier, later in itertools.pairwise(after))


def test_cosine_is_halfway_in_the_middle() -> None:
    assert rates(warmup_steps=0, num_steps=101)[50] == pytest.approx(0.55)


def test_wsd_is_stable_until_its_decay() -> None:
    values = rates(decay="wsd", decay_fraction=0.3)
    assert values[10:70] == [1.0] * 60
    assert values[71] < 1.0


def test_a_constant_rate_does_not_change() -> None:
    assert set(rates(decay="constant")[10:]) == {1.0}


def test_no_warm_up_starts_at_the_peak() -> None:
    assert rates(warmup_steps=0)[0] == 1.0


def test_a_run_of_one_step_has_a_rate() -> None:
    assert rates(num_steps=1, warmup_steps=0) == [1.0]
    assert rates(num_steps=1, warmup_steps=10) == [pytest.approx(0.1)]
