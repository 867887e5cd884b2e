"""Milliseconds are measured once on a machine, for each shape of the models."""

from __future__ import annotations

import platform

from kept_progress import KeptProgress
from pass_clock import clock_of_passes
from pretended_ray import idle_ray, run_tasks_here

from orchestrator.evaluation import decode_timing
from orchestrator.planning.machine import Node
from orchestrator.reporting.costs import with_costs
from orchestrator.settings import resolve_settings


def test_times_are_found_again_on_the_machine_that_measured_them_alone(
    tiny_plan, tmp_path, monkeypatch
):
    monkeypatch.setattr(decode_timing, "SWEEP_REPETITIONS", 1)
    monkeypatch.setattr(decode_timing, "SWEEP_NEW_TOKENS", 2)
    progress = KeptProgress()

    def milliseconds(seconds_per_pass: float, *assignments: str) -> set[float]:
        settings = resolve_settings({}, assignments)
        with clock_of_passes(lambda *_: seconds_per_pass):
            trials = with_costs(tiny_plan.trials, tiny_plan, tmp_path / "sweep", settings, progress)
        return {trial.numbers["cost/decode_ms_per_token"] for trial in trials}

    assert milliseconds(1.0) == {1000.0}
    assert milliseconds(2.0) == {1000.0}
    num_shapes = len({str(trial.model.to_dict()) for trial in tiny_plan.trials})
    assert progress.summaries == [f"{num_shapes} models, the slowest 1000.0 ms"]
    # A workspace on a shared disk is used on several machines.
    monkeypatch.setattr(platform, "machine", lambda: "another")
    assert milliseconds(2.0) == {2000.0}
    # Trials with GPUs are timed on one, here by a task that uses the CPU.
    idle_ray(monkeypatch, Node(1, gpus=1))
    run_tasks_here(monkeypatch)
    assert milliseconds(3.0, "cluster.num_gpus=1") == {3000.0}
    assert milliseconds(4.0, "cluster.num_gpus=1") == {3000.0}
