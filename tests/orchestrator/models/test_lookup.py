"""Commands find a model by path, by name, or the newest; they never use another one silently."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import assert_names, refused
from sample_trials import sample_trial

from iiet.model.schedule import IterationSchedule
from orchestrator import cli
from orchestrator.models.lookup import Picked, find_pretraining
from orchestrator.models.open import OpenedModel, open_model, open_models
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import write_json
from orchestrator.workspace.layout import DONE_NAME, JOB_NAME


@pytest.fixture
def save_run(workspace, save_tiny) -> Callable[..., Path]:
    """Write a run's checkpoint; each run is newer than those before."""
    ages = iter(range(1, 100))

    def write(name: str, **changes: Any) -> Path:
        if changes.get("method", "iiet") != "iiet":
            changes["schedule"] = None
        checkpoint = save_tiny(workspace.runs / name, **changes)
        age = next(ages)
        os.utime(workspace.runs / name, (age, age))
        return checkpoint

    return write


def test_a_name_means_a_run_or_a_path_inside_the_workspace(
    workspace, save_run, tmp_path, monkeypatch
):
    with refused(UserError, "no runs"):
        open_model("teacher", workspace)
    checkpoint = save_run("teacher")
    for typed in ("teacher", "runs/teacher", "runs/teacher/step_00000001", str(checkpoint)):
        for folders in ("any", "exports", "none"):
            model = open_model(typed, workspace, folders=folders)
            assert (model.path, model.label) == (checkpoint, "teacher")
    # The source of an imported model does not hide its run; what can read both takes the nearer.
    source = tmp_path / "teacher"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.chdir(tmp_path)
    for folders in ("exports", "none"):
        assert open_model("teacher", workspace, folders=folders).path == checkpoint
    for folders in ("any", "exports", "none"):
        with pytest.raises(UserError, match=rf"{source} has no weights"):
            open_model("teacher" if folders == "any" else source, workspace, folders=folders)
    for number in range(3):
        save_run(f"run{number:02}")
    with refused(UserError, "other", "run00", "teacher"):
        open_model("other", workspace)


def test_without_a_name_the_newest_of_finished_runs_and_picks_is_used_and_announced(
    workspace, save_run
):
    notes: list[str] = []

    def newest(*, with_corrections: bool = False) -> OpenedModel:
        model = open_model(None, workspace, with_corrections=with_corrections, note=notes.append)
        assert str(model.path) in notes.pop()
        return model

    with refused(UserError, "finished", "iiet-orch pretrain"):
        open_model(None, workspace)
    teacher = save_run("teacher")
    write_json(teacher.parent / JOB_NAME, {})
    with refused(UserError, "finished"):
        open_model(None, workspace)  # It is still being trained.
    write_json(teacher.parent / DONE_NAME, {})
    os.utime(teacher.parent, (1, 1))
    assert newest().path == teacher
    plain = save_run("plain", method="vanilla")
    assert newest().path == plain
    # What needs an IIET with corrections passes over other models, which can be named.
    levels = save_run("levels", method="pcformer")
    assert open_model("levels", workspace, with_corrections=True).path == levels
    assert newest(with_corrections=True).path == teacher
    assert newest().path == levels
    picked = Picked(sweep="s", checkpoint=str(teacher), schedule="1,0", time=50.0)
    picked.write(workspace.picked)
    assert (newest().path, newest().schedule) == (teacher, IterationSchedule((1, 0)))
    models = open_models([], workspace, ["1", "2"], note=notes.append)
    assert [model.path for model in models] == [teacher] * 2
    assert len(notes) == 1, "it is announced once, under how many schedules it is opened"
    notes.clear()
    later = save_run("later")
    os.utime(later.parent, (60, 60))
    assert newest().path == later


def test_a_workspace_without_corrections_lists_its_other_models(workspace, save_run):
    save_run("plain", method="vanilla")
    with refused(UserError, "plain (vanilla)", "pretrain"):
        open_model(None, workspace, with_corrections=True)


def test_no_command_replaces_a_damaged_model_by_an_older_one(workspace, save_run, capfd):
    older = save_run("full")
    newest = older.rename(older.with_name("step_00000010"))
    save_run("full")
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    before = sorted(workspace.root.glob("[!l]*/**"))
    for command, *options in (
        ("sweep-threshold", "full"),
        ("influence",),
        ("distill", "full", "-r", "1"),
        ("export",),
        ("generate", "full", "--prompt", "abc"),
    ):
        assert cli.main([command, *options, "--workspace", str(workspace.root)]) == 1, command
        printed = " ".join(capfd.readouterr().err.split())
        assert_names(printed, newest, "model.safetensors", older)
    assert sorted(workspace.root.glob("[!l]*/**")) == before, "nothing was written"
    assert open_model(older, workspace).path == older


def test_a_schedule_for_a_model_without_corrections_is_refused(save_run):
    plain = open_model(save_run("plain", method="vanilla"))
    with refused(UserError, "--draft", "'vanilla'"):
        plain.with_schedule("2", "--draft")
    assert plain.with_schedule("0").schedule == IterationSchedule((0, 0))


def test_a_model_without_corrections_has_no_schedule_where_models_are_shown(
    workspace, save_run, capfd
):
    checkpoint = save_run("plain", method="vanilla")
    command = ["generate", "plain", "--prompt", "abc", "-n", "2", "-w", str(workspace.root)]
    assert cli.main(command) == 0
    assert f"model: {checkpoint}, schedule -\n" in capfd.readouterr().err
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["schedule"] is None


def test_a_trial_is_named_as_the_list_shows_it(workspace, save_run, save_tiny, capsys):
    """A trial without weights of its own has a name, and so has one that is not measured yet."""
    full = save_run("full")
    student = save_tiny(workspace.trials / "0123456789abcdef", schedule=[1, 0])
    pruned = workspace.trials / "fedcba9876543210"
    for folder, schedule, checkpoint in (
        (student.parent, (1, 0), student), (pruned, (2, 0), full),
    ):  # fmt: skip
        trial = sample_trial(
            key=folder.name, schedule=schedule, checkpoint=str(checkpoint), folder=str(folder)
        )
        trial.write(trial.result_path)
    named = {
        pruned.name: (full, IterationSchedule((2, 0))),
        f"trials/{pruned.name}": (full, IterationSchedule((2, 0))),
        student.parent.name: (student, IterationSchedule((1, 0))),
    }
    for typed, expected in named.items():
        for folders in ("any", "exports", "none"):
            model = open_model(typed, workspace, folders=folders)
            assert (model.path, model.schedule) == expected
    unmeasured = save_tiny(workspace.trials / "00000000ffffffff")
    assert open_model(unmeasured.parent.name, workspace).path == unmeasured
    where = ["--workspace", str(workspace.root)]
    assert cli.main(["list", "trials", "--json", *where]) == 0
    listed = [entry["name"] for entry in json.loads(capsys.readouterr().out)["trials"]]
    for name in listed:
        assert cli.main(["generate", name, "--prompt", "abc", "-n", "2", "--json", *where]) == 0
        used = json.loads(capsys.readouterr().out)
        checkpoint, schedule = named.get(name, (unmeasured, IterationSchedule((2, 1))))
        assert (used["model"], used["schedule"]) == (str(checkpoint), list(schedule))
        assert cli.main(["export", name, "--no-measure", "--json", *where]) == 0
        assert Path(json.loads(capsys.readouterr().out)["folder"]).is_dir()


def test_what_was_not_pretrained_cannot_be_continued(workspace, save_run, capfd):
    save_run("imported", provenance={"imported": {"from": "elsewhere"}})
    save_run("saved")
    for run, words in (("imported", "was imported"), ("saved", "was not made by")):
        with pytest.raises(UserError, match=words):
            find_pretraining(workspace, Path(run))
        command = ["pretrain", "--continue", run, "--steps", "9", "-w", str(workspace.root)]
        assert cli.main(command) == 2
        assert words in " ".join(capfd.readouterr().err.split())
