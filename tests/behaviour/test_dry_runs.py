"""`--dry-run` writes and starts nothing, needs no network, and names the trials of the sweep."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from commands import settings_options
from fake_runs import end_trials, trained
from small_size import SMALL

from orchestrator import SweepPlan, cli, measure_influence, plan_sweep, sweep
from orchestrator.records.trial import SweepTrials
from orchestrator.settings import resolve_settings
from orchestrator.settings.files import shipped_sweeps
from orchestrator.workspace.files import VERIFIED_NAME
from orchestrator.workspace.layout import PLAN_FILE, open_workspace

OFFLINE = """
import contextlib, io, json, socket, sys

def refuse(*arguments, **options):
    raise AssertionError("a dry run used the network")

socket.socket.connect = socket.socket.bind = socket.getaddrinfo = refuse
from orchestrator.cli import main
answers = {}
for name, arguments in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main(arguments)
    answers[name] = (code, out.getvalue())
    loaded = {"ray", "mlflow", "lm_eval", "datasets"} & set(sys.modules)
    assert name.split()[0] in ("pick", "evaluate") or not loaded, (name, loaded)
print(json.dumps(answers))
"""


def small(*words: str) -> list[str]:
    """Return a command with the options that make it small."""
    return [*words, *settings_options(SMALL, words[0])]


FROM_SETTINGS = {
    "pretrain": small("pretrain"),
    "quickstart": small("quickstart"),
    "sweep-iterations": small("sweep-iterations"),
    **{f"sweep {name}": ["sweep", name] for name in shipped_sweeps()},
}
"""Dry runs that need nothing of a workspace."""
FROM_MODELS = {
    "distill": small("distill", "full", "-r", "1"),
    "distill -r x": small("distill", "full", "-r", "x,1,1"),
    "sweep-threshold": small("sweep-threshold", "full"),
    "search": small("sweep-threshold", "full", "--search", "2"),
    "influence": small("influence", "full"),
    "benchmark": ["benchmark", "full"],
    "pick": ["pick", "mine", "--best"],
    "evaluate": small("evaluate", "full"),
}
"""Dry runs about a model or a sweep of a workspace."""


def dry_runs(commands: dict[str, list[str]], workspace: Path) -> dict[str, tuple[int, str]]:
    """Run commands in a process without a network; return exit codes and what was printed."""
    commands = {
        name: [*arguments, "--dry-run", "-w", str(workspace)]
        for name, arguments in commands.items()
    }
    command = [sys.executable, "-c", OFFLINE, json.dumps(commands)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    return {name: (code, printed) for name, (code, printed) in json.loads(completed.stdout).items()}


def tree(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of everything in a folder."""
    paths = [folder, *folder.rglob("*")]
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


def test_every_command_with_a_dry_run_is_run_here():
    commands = typer.main.get_command(cli.commands).commands
    with_option = {n for n, c in commands.items() if any("--dry-run" in p.opts for p in c.params)}
    # `clean` asks before it deletes; test_clean.py runs it.
    assert with_option - {"clean"} == {
        arguments[0] for arguments in (FROM_SETTINGS | FROM_MODELS).values()
    }


@pytest.mark.slow
def test_a_missing_workspace_stays_missing(tmp_path):
    for name, (code, printed) in dry_runs(FROM_SETTINGS | FROM_MODELS, tmp_path / "ws").items():
        assert code == (0 if name in FROM_SETTINGS else 2), printed
        if name in FROM_SETTINGS:
            assert "not prepared" in printed
            assert " FLOPs" in printed
            assert "at most" in printed
    assert not (tmp_path / "ws").exists()


@pytest.mark.slow
def test_a_dry_run_names_what_the_sweep_does_and_changes_no_file(
    small_sweep, tmp_path, monkeypatch
):
    # Only the teacher is left of the finished sweep, without its influence.
    workspace = open_workspace(shutil.copytree(small_sweep, tmp_path / "workspace"))
    [teacher] = workspace.runs.glob("iiet-r2-*")
    for file in teacher.glob("step_*/influence-*"):
        file.unlink()
    shutil.rmtree(workspace.trials)
    teacher = teacher.rename(tmp_path / "full")
    shutil.rmtree(workspace.runs)
    workspace.runs.mkdir()
    teacher.rename(workspace.runs / "full")
    settings = resolve_settings({}, SMALL)

    def plan() -> SweepPlan:
        return plan_sweep(settings, workspace=workspace, teacher="full", name="mine")

    unknown = plan()
    assert "influence" in " ".join(unknown.notes)
    assert unknown.price.num_trainings == settings.sweep.num_schedules
    measure_influence(settings, workspace=workspace, model="full")
    planned = plan()
    assert unknown.price.flops > planned.price.flops > 0, "an upper bound"
    assert unknown.price.hours > planned.price.hours
    assert sum(unknown.price.disk.values()) >= sum(planned.price.disk.values())
    end_trials(monkeypatch, trained)
    sweep(settings, workspace=workspace, teacher="full", name="mine")
    assert SweepTrials.read(workspace.sweeps / "mine" / PLAN_FILE) == planned.trials
    finished_plan = plan()
    assert {state.status for state in finished_plan.states} == {"finished"}
    assert finished_plan.price.num_trainings == 0

    for stamp in workspace.root.rglob(VERIFIED_NAME):
        stamp.unlink()
    before = tree(workspace.root)
    for name, (code, printed) in dry_runs(FROM_MODELS, workspace.root).items():
        assert code == 0, printed
        if name in ("sweep-threshold", "search"):
            assert "4 of 4 trials" in printed
    assert tree(workspace.root) == before
