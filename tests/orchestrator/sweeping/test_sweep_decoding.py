"""Drafts of a sweep's models are measured when asked, once, for text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from iiet.schedule import IterationSchedule
from orchestrator import cli
from orchestrator.records.trial import Trial
from orchestrator.reporting.results import StoredSweep, load_sweep_results
from orchestrator.sweeping import decode
from orchestrator.sweeping.decode import with_drafts
from orchestrator.sweeping.plan import exact_cost
from orchestrator.sweeping.students import checkpoint_trial
from orchestrator.terminal.progress import Progress
from orchestrator.training.world import on_cpu
from orchestrator.workspace.layout import open_workspace


@pytest.fixture
def results(tiny_plan, tmp_path) -> list[Trial]:
    """A teacher, and its weights without corrections."""
    teacher = tiny_plan.trials[0]
    assert teacher.role == "teacher"
    config = teacher.model
    pruned = checkpoint_trial(
        "trial",
        "0,0",
        Path(str(teacher.checkpoint)),
        replace(config, schedule=IterationSchedule.none(2)),
        teacher.suite,
        open_workspace(tmp_path),
    )
    return [
        trial.with_numbers("cost", exact_cost(trial.model, config)) for trial in (teacher, pruned)
    ]


def test_the_pruned_teacher_is_measured_as_the_teachers_draft_when_asked(
    results, tiny_plan, tmp_path, monkeypatch
):
    tokens = Path(tiny_plan.tokens_folder)
    assert with_drafts(results, tokens, tmp_path, Progress()) == results, "nothing is measured"
    full, pruned = with_drafts(results, tokens, tmp_path, Progress(), on_cpu)
    names = {"decoding/acceptance", "decoding/exact_ms_per_token", "decoding/speed_up"}
    assert not set(full.numbers) & names
    assert set(pruned.numbers) >= names
    assert 0 <= pruned.metrics()["decoding/acceptance"] <= 1
    monkeypatch.setattr(decode, "_measure_drafts", pytest.fail)
    for on_device in (on_cpu, None):  # What is stored stays in the report of a later run, too.
        found = with_drafts(results, tokens, tmp_path, Progress(), on_device)
        assert found == [full, pruned]


@pytest.mark.slow
def test_the_command_adds_drafts_to_the_report_of_a_sweep(results, tmp_path, capsys):
    space = open_workspace(tmp_path)
    measured = [trial.with_numbers("quality", {"accuracy": 0.5}) for trial in results]
    StoredSweep(name="s", key="k", results=tuple(measured)).store(space)
    command = ["benchmark", "--drafts", "s", "--json", "-w", str(tmp_path)]
    assert cli.main([*command, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == {"sweep": "s", "drafts": ["0,0"]}
    assert cli.main(command) == 0
    assert "0,0" in capsys.readouterr().out
    teacher, pruned = load_sweep_results(space, "s").results
    assert "decoding/speed_up" in pruned.numbers
    assert "decoding/speed_up" not in teacher.numbers
