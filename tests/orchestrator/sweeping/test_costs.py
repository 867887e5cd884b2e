"""Milliseconds are measured once on a machine, for each shape of the models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.settings import resolve_settings
from orchestrator.sweeping import costs
from orchestrator.sweeping.costs import with_costs
from orchestrator.terminal.progress import Progress


def test_times_are_found_again_on_the_machine_that_measured_them_alone(
    tiny_plan, tmp_path, monkeypatch
):
    measured: list[int] = []

    def time_per_token(decoders: Mapping[str, Any], _: Progress) -> dict[str, dict[str, float]]:
        measured.append(len(decoders))
        return {shape: {"decode_ms_per_token": float(len(measured))} for shape in decoders}

    monkeypatch.setattr(costs, "time_per_token", time_per_token)

    def milliseconds() -> set[float]:
        trials = with_costs(
            tiny_plan.trials, tiny_plan, tmp_path / "sweep", resolve_settings({}), Progress()
        )
        return {trial.numbers["cost/decode_ms_per_token"] for trial in trials}

    assert milliseconds() == {1.0}
    assert milliseconds() == {1.0}
    assert measured == [len({str(trial.model.to_dict()) for trial in tiny_plan.trials})]
    # A workspace on a shared disk is used on several machines.
    monkeypatch.setattr(costs, "timing_environment", lambda: {"processor": "another"})
    assert milliseconds() == {2.0}
