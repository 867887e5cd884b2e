"""A trial whose process is killed under Tune resumes and gives the same result."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from changed_trials import in_folder, with_job

from orchestrator.models.folder import weights_key
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.settings import resolve_settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints


def long_trial(trial: Trial, folder: Path) -> Trial:
    """Return the trial with another folder and more frequent checkpoints."""
    longer = with_job(trial, {"num_steps": 400, "checkpoint_every_steps": 20})
    return in_folder(longer, folder, key=folder.name, label=folder.name)


def events(trial: Trial, name: str) -> list[dict[str, Any]]:
    return [r for r in read_journal(Path(trial.folder))[0] if r.get("name") == name]


def losses(trial: Trial) -> dict[int, float]:
    """Return the last recorded loss of each step."""
    return {
        record["step"]: record["values"]["train/loss"]
        for record in read_journal(Path(trial.folder))[0]
        if "train/loss" in record.get("values", {})
    }


@pytest.mark.slow
def test_a_killed_process_loses_only_the_steps_since_the_last_checkpoint(
    tiny_plan: SweepPlan, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.sweeping import trial_queue as trial_rounds

    killed, whole = (long_trial(tiny_plan.trials[1], tmp_path / n) for n in ("killed", "whole"))
    run_one = trial_rounds.run_tune_trial

    def measure_losses_only(parameters: dict[str, Any], context: Any) -> dict[str, Any]:
        from orchestrator.evaluation.measuring import heldout_loss
        from orchestrator.models.open import load_model
        from orchestrator.sweeping import trial_run

        def measure(trial: Trial, device: str) -> Trial:
            model = load_model(Path(str(trial.checkpoint)), schedule=trial.model.corrections)
            loss = heldout_loss(model, Path(trial.suite.tokens_folder))
            return trial.with_numbers("quality", {"validation_loss": loss})

        trial_run.measure_trial = measure
        return run_one(parameters, context)

    class Killer(Progress):
        saved = 0

        def advance(self, *_: Any, **__: Any) -> None:
            if not self.saved and (found := find_checkpoints(Path(killed.folder))):
                os.kill(events(killed, "started")[0]["pid"], signal.SIGKILL)
                self.saved = int(found[-1].name.removeprefix("step_"))

    monkeypatch.setattr(trial_rounds, "run_tune_trial", measure_losses_only)
    killer = Killer()
    settings = resolve_settings({}).sweep
    rounds = trial_rounds.TrialQueue(tmp_path / "sweep", settings, killer, num_all=2)
    rounds.run([killed, whole])
    assert rounds.failures == {}
    assert rounds.made == {"killed", "whole"}
    (started,), (resumed,) = events(killed, "started"), events(killed, "resumed")
    assert resumed["pid"] != started["pid"]
    assert killer.saved <= resumed["step"] < 400
    assert resumed["step"] % 20 == 0
    assert not events(whole, "resumed")

    results = [killed.result(), whole.result()]
    assert results[0]
    assert results[1]
    numbers = [result.numbers for result in results if result]
    assert numbers[0].keys() == numbers[1].keys()
    for name in numbers[0].keys() - {"train/seconds"}:
        assert numbers[0][name] == numbers[1][name]
    assert losses(killed) == losses(whole)
    weights = [weights_key(Path(str(result.checkpoint))) for result in results if result]
    assert weights[0] == weights[1]
