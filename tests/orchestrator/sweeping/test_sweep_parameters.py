"""A sweep's run has the parameters of its kind, and those that its trainings share."""

from __future__ import annotations

import pytest
from changed_trials import with_job

from orchestrator.records.trial import SweepPlan
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.live import sweep_parameters


def parameters(plan: SweepPlan, kind: str, *assignments: str) -> dict[str, str]:
    settings = resolve_settings({}, [f"sweep.kind={kind}", *assignments])
    return sweep_parameters(plan.model_copy(update={"kind": kind}), settings)


def test_each_kind_has_its_own(tiny_plan: SweepPlan) -> None:
    threshold = parameters(tiny_plan, "threshold")
    search = parameters(tiny_plan, "search", "search.seed=0")
    iterations = parameters(tiny_plan, "iterations")
    assert {"num_schedules", "influence_metric", "selection", "control"} <= set(threshold)
    assert not any(name.startswith(("search.", "asha")) for name in threshold)
    own = ("num_trials", "objective", "sampler", "population_size", "seed")
    assert set(search) - set(threshold) == {f"search.{name}" for name in own}
    assert iterations["iterations"] == "0, 1, 2, 3"
    assert not {"num_schedules", "influence_metric", "control", "asha"} & set(iterations)
    assert len(iterations) < 40


@pytest.mark.parametrize(
    ("given", "name"),
    [("sweep.thresholds=[0.1, 0.2]", "thresholds"), ("sweep.budgets=[8, 12]", "budgets")],
)
def test_what_decides_the_schedules_is_named(tiny_plan: SweepPlan, given: str, name: str) -> None:
    found = parameters(tiny_plan, "threshold", given)
    assert {"num_schedules", "thresholds", "budgets"} & set(found) == {name}
    assert ("budget_unit" in found) == (name == "budgets")


def test_trainings_share_what_none_has_otherwise(tiny_plan: SweepPlan) -> None:
    trials = [
        with_job(trial, {"learning_rate": rate, "num_steps": 7})
        for trial, rate in zip(tiny_plan.trials[1:], (0.1, 0.2), strict=False)
    ]
    plan = tiny_plan.model_copy(update={"trials": tuple(trials)})
    found = parameters(plan, "iterations")
    assert found["num_steps"] == "7"
    assert "learning_rate" not in found
    assert not any(name.startswith("r_") for name in found)
