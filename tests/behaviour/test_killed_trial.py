"""A trial whose process is killed under Tune resumes and gives the same result."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from changed_trials import in_folder, with_job
from list_queue import ListQueue, run_queue
from same_run import curve, events

from orchestrator.cluster.tune import TrialPlace
from orchestrator.models.folder import weights_key
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.training.trainer import run_job
from orchestrator.workspace.layout import find_checkpoints, step_of


@pytest.mark.slow
def test_a_killed_process_loses_only_the_steps_since_the_last_checkpoint(
    tiny_plan: SweepPlan, tmp_path: Path, ray_session: None
) -> None:
    longer = with_job(tiny_plan.trials[1], {"num_steps": 300, "checkpoint_every_steps": 20})
    trial = in_folder(longer, tmp_path / "killed", key="killed", label="killed")
    job, saved = trial.job, list[int]()
    assert job

    def train(trial: Trial, place: TrialPlace) -> Trial | None:
        from orchestrator.sweeping import trial as module

        module.measure_trial = lambda trial, _: trial.with_numbers("quality", {"accuracy": 0.5})
        return module.run_trial(trial, place, wait=False)

    def kill() -> None:
        if not saved and (found := find_checkpoints(job.folder)):
            os.kill(events(job, "started")[0]["pid"], signal.SIGKILL)
            saved.append(step_of(found[-1]))

    ended = run_queue(ListQueue([trial], watch=kill), train, tmp_path)
    result = trial.result()
    assert result
    assert ended == {"killed": (result, "")}
    [started], [resumed] = events(job, "started"), events(job, "resumed")
    assert resumed["pid"] != started["pid"]
    assert saved[0] <= resumed["step"] < 300
    assert resumed["step"] % 20 == 0
    torch.set_num_threads(resumed["num_threads"])
    undisturbed = job.model_copy(update={"run_folder": str(tmp_path / "alone")})
    alone = run_job(undisturbed)
    assert curve(job) == curve(undisturbed)
    assert weights_key(Path(str(result.checkpoint))) == weights_key(Path(str(alone.checkpoint)))
