"""Which trials compete, and why one was stopped."""

from __future__ import annotations

from pathlib import Path

from changed_trials import in_folder, with_job

from orchestrator.records.trial import AshaTrial, SweepPlan, Trial
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.asha import (
    asha_trials,
    discard_early_stop,
    record_early_stop,
    stored_early_stop,
)
from orchestrator.workspace.journal import VALIDATION_METRIC, Journal
from orchestrator.workspace.layout import STOPPED_NAME


def rates(plan: SweepPlan, folder: Path) -> tuple[Trial, Trial, Trial]:
    low, middle, high = (
        in_folder(with_job(plan.trials[1], {"learning_rate": rate}), folder / name, key=name,
                  label=name)
        for name, rate in (("low", 1e-5), ("middle", 1e-3), ("high", 1e-2))
    )  # fmt: skip
    return low, middle, high


def asha_of(plan: SweepPlan, *trials: Trial, first_rung: float = 0.25) -> dict[str, AshaTrial]:
    assignments = ["sweep.asha=true", f"sweep.asha_first_rung={first_rung}"]
    plan = plan.model_copy(update={"kind": "iterations", "trials": trials})
    return asha_trials(plan, resolve_settings({}, assignments).sweep)


def test_the_same_model_at_other_rates_competes(tiny_plan: SweepPlan, tmp_path: Path) -> None:
    low, _, high = rates(tiny_plan, tmp_path)
    asha = asha_of(tiny_plan, low, high, tiny_plan.trials[2])
    assert asha[low.key].competitors == {high.label: high.folder}, "another schedule is no rate"
    assert tiny_plan.trials[2].key not in asha
    shares = with_job(low, {}, first_stages=str(tmp_path))
    assert asha_of(tiny_plan, shares, high)[low.key] == asha[low.key], "it changes no model"
    assert asha_of(tiny_plan, low) == {}


def test_a_verdict_is_written_once_and_is_of_one_rule(tiny_plan: SweepPlan, tmp_path: Path) -> None:
    low, middle, high = rates(tiny_plan, tmp_path)
    asha = asha_of(tiny_plan, low, middle, high)
    for trial, loss in ((high, 1.0), (middle, 3.0)):
        journal = Journal(Path(trial.folder))
        journal.metrics(10, {VALIDATION_METRIC: loss})
        journal.close()
    record_early_stop(asha, low.key, 10, 5.0)
    stop = stored_early_stop(low, asha[low.key])
    assert stop is not None
    assert stop.text == (
        "stopped early at step 10 of 40: its validation loss is 5.000, high had 1.000"
    )
    record_early_stop(asha, low.key, 20, 9.0)
    assert stored_early_stop(low, asha[low.key]) == stop
    other = asha_of(tiny_plan, low, middle, high, first_rung=0.5)[low.key]
    assert stored_early_stop(low, other) is None, "another rule did not stop it"
    alone = asha[low.key].model_copy(update={"competitors": {}})
    assert stored_early_stop(low, alone) is None, "a sweep without the competitor did not"
    discard_early_stop(low)
    assert not (Path(low.folder) / STOPPED_NAME).exists()
