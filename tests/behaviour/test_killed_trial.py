"""A trial whose process is killed under Tune resumes and gives the same result."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from changed_trials import in_folder, with_job
from list_queue import ListQueue, run_queue
from same_run import curve

from orchestrator.cluster.tune import TrialPlace
from orchestrator.models.folder import weights_key
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints


def long_trial(trial: Trial, folder: Path) -> Trial:
    """Return the trial with another folder and more frequent checkpoints."""
    longer = with_job(trial, {"num_steps": 400, "checkpoint_every_steps": 20})
    return in_folder(longer, folder, key=folder.name, label=folder.name)


def events(trial: Trial, name: str) -> list[dict[str, Any]]:
    return [r for r in read_journal(Path(trial.folder))[0] if r.get("name") == name]


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

    def kill() -> None:
        if not saved and (found := find_checkpoints(Path(killed.folder))):
            os.kill(events(killed, "started")[0]["pid"], signal.SIGKILL)
            saved.append(int(found[-1].name.removeprefix("step_")))

    ended = run_queue(ListQueue([killed, whole], watch=kill), train, tmp_path)
    assert ended == {"killed": (killed.result(), ""), "whole": (whole.result(), "")}
    (started,), (resumed,) = events(killed, "started"), events(killed, "resumed")
    assert resumed["pid"] != started["pid"]
    assert saved[0] <= resumed["step"] < 400
    assert resumed["step"] % 20 == 0
    assert not events(whole, "resumed")

    results = [killed.result(), whole.result()]
    assert results[0]
    assert results[1]
    numbers = [result.numbers for result in results if result]
    assert numbers[0].keys() == numbers[1].keys()
    for name in numbers[0].keys() - {"train/seconds"}:
        assert numbers[0][name] == numbers[1][name]
    assert killed.job
    assert whole.job
    assert curve(killed.job) == curve(whole.job)
    weights = [weights_key(Path(str(result.checkpoint))) for result in results if result]
    assert weights[0] == weights[1]
