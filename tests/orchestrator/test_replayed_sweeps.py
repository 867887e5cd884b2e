"""The replay of a sweep reads what trials left behind, also in a workspace that was moved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.early_stop import main
from orchestrator import trial_run
from orchestrator.plan import PlannedTrial, SweepPlan
from orchestrator.training.job import DONE_NAME
from orchestrator.trial_run import run_trial
from orchestrator.workspace import read_json, write_json


def with_looks(trial: PlannedTrial) -> PlannedTrial:
    assert trial.job is not None
    recipe = {**trial.job["recipe"], "validate_every_steps": 5, "learning_rate": 1e-6}
    return replace(trial, job={**trial.job, "recipe": recipe})


def test_a_finished_sweep_is_replayed_where_it_lies_now(
    tiny_plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        trial_run, "measure_quality", lambda *_: {"accuracy": 0.5, "validation_loss": 3.0}
    )
    cheap, costly = with_looks(tiny_plan.trials[-1]), with_looks(tiny_plan.trials[1])
    for trial in (cheap, costly):
        assert run_trial(trial.to_dict()).state == "made"
    done = Path(cheap.folder) / DONE_NAME
    write_json(done, {**read_json(done), "validation_loss": 0.01})
    plan = replace(tiny_plan, trials=(tiny_plan.trials[0], costly, cheap))
    folder = tmp_path / "elsewhere" / "sweeps" / "mine"
    write_json(folder / "plan.json", plan.to_dict())
    (tmp_path / "trials").rename(tmp_path / "elsewhere" / "trials")

    found = tmp_path / "found.json"
    assert main([str(folder), "--at-once", "1", "--json", str(found)]) == 0
    stored = json.loads(found.read_text())
    assert (stored["trainings"], stored["looks"]) == (2, 14)
    first, last = stored["rows"]
    assert first["stopped"] == {}, "the costly one was there first"
    assert set(last["stopped"]) == {costly.label}
    assert last["steps saved"] == pytest.approx(20 / 80)
    assert last["accuracy"]["unchanged"] is True


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 2
    write_json(tmp_path / "plan.json", {"trials": []})
    assert main([str(tmp_path)]) == 2


def test_rates_are_replayed_as_asha_would_have_seen_them(
    tiny_plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_run, "measure_quality", lambda *_: {"validation_loss": 3.0})
    trials = []
    for name, rate in (("high", 1e-2), ("low", 1e-6)):
        trial = with_looks(tiny_plan.trials[1])
        assert trial.job is not None
        folder = str(tmp_path / "runs" / name)
        recipe = {**trial.job["recipe"], "learning_rate": rate}
        job = {**trial.job, "recipe": recipe, "run_folder": folder}
        trial = replace(trial, key=name, label=name, folder=folder, job=job)
        assert run_trial(trial.to_dict()).state == "made"
        trials.append(trial)
    plan = replace(tiny_plan, kind="iterations", trials=tuple(trials))
    folder = tmp_path / "sweeps" / "rates"
    write_json(folder / "plan.json", plan.to_dict())
    found = tmp_path / "found.json"
    assert main([str(folder), "--at-once", "1", "--json", str(found)]) == 0
    [row] = json.loads(found.read_text())["rows"]
    assert set(row["stopped"]) == {"low"}
    assert row["best rates"] == {"unchanged": True, "lost": []}
