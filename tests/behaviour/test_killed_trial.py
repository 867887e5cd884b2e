"""A trial whose process is killed under Tune resumes and gives the same result."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from changed_trials import in_folder, with_job
from list_queue import ListQueue, run_queue
from same_run import curve, events

from orchestrator.cluster.tune import TrialPlace
from orchestrator.models.folder import weights_key
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.workspace.layout import find_checkpoints


def long_trial(trial: Trial, folder: Path) -> Trial:
    """Return the trial with another folder and more frequent checkpoints."""
    longer = with_job(trial, {"num_steps": 400, "checkpoint_every_steps": 20})
    return in_folder(longer, folder, key=folder.name, label=folder.name)


@pytest.mark.slow
def test_a_killed_process_loses_only_the_steps_since_the_last_checkpoint(
    tiny_plan: SweepPlan, tmp_path: Path, ray_session: None
) -> None:
    killed, whole = (long_trial(tiny_plan.trials[1], tmp_path / n) for n in ("killed", "whole"))
    saved: list[int] = []

    def train(trial: Trial, place: TrialPlace) -> Trial | None:
        from orchestrator.evaluation.measuring import heldout_loss
        from orchestrator.models.open import load_model
        from orchestrator.sweeping import trial as module

        def measure(trial: Trial, device: str) -> Trial:
            model = load_model(Path(str(trial.checkpoint)), schedule=trial.model.corrections)
            loss = heldout_loss(model, Path(trial.suite.tokens_folder))
            return trial.with_numbers("quality", {"validation_loss": loss})

        module.measure_trial = measure
        return module.run_trial(trial, place, wait=False)

    jobs = [trial.job for trial in (killed, whole)]
    first, second = jobs
    assert first
    assert second

    def kill() -> None:
        if not saved and (found := find_checkpoints(first.folder)):
            os.kill(events(first, "started")[0]["pid"], signal.SIGKILL)
            saved.append(int(found[-1].name.removeprefix("step_")))

    ended = run_queue(ListQueue([killed, whole], watch=kill), train, tmp_path)
    assert ended == {"killed": (killed.result(), ""), "whole": (whole.result(), "")}
    [started], [resumed] = events(first, "started"), events(first, "resumed")
    assert resumed["pid"] != started["pid"]
    assert saved[0] <= resumed["step"] < 400
    assert resumed["step"] % 20 == 0
    assert not events(second, "resumed")

    one, other = (result for result, _ in ended.values())
    assert one
    assert other
    assert {**one.numbers, "train/seconds": 0} == {**other.numbers, "train/seconds": 0}
    assert curve(first) == curve(second)
    assert weights_key(Path(str(one.checkpoint))) == weights_key(Path(str(other.checkpoint)))
