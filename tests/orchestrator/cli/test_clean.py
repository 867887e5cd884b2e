"""`clean` deletes what can go, and nothing that a process or a finished result needs."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from file_modes import only_readable
from same_run import stop_at

from orchestrator import cli
from orchestrator.training.run_locks import lock_run_folder
from orchestrator.training.trainer import run_job
from orchestrator.workspace.files import new_folder, write_json
from orchestrator.workspace.layout import (
    RAY_FOLDER,
    SWEEP_LOCK_NAME,
    Workspace,
    find_checkpoints,
    open_workspace,
)
from orchestrator.workspace.locks import lock_file

Clean = Callable[..., list[str]]
KILLED = """
import os
from orchestrator.workspace.files import make_scratch_folder
print(make_scratch_folder().folder, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def space(tmp_path) -> Workspace:
    return open_workspace(tmp_path)


@pytest.fixture
def clean(space, capsys) -> Clean:
    """Runs `clean --json` and returns the deleted paths (without `--yes` those that can go)."""

    def command(*words: str) -> list[str]:
        assert cli.main(["clean", *words, "--json", "--workspace", str(space.root)]) == 0
        printed = json.loads(capsys.readouterr().out)
        entries = printed["deleted" if "--yes" in words else "found"]
        assert all(entry["reason"] for entry in entries)
        paths = [Path(entry["path"]) for entry in entries]
        return [str(p.relative_to(space.root)) for p in paths if p.is_relative_to(space.root)]

    return command


@pytest.fixture
def finished_run(tiny_job) -> Path:
    """The folder of a finished run of 6 steps with checkpoints after 2, 4 and 6."""
    job = tiny_job("runs/whole", num_steps=6, checkpoint_every_steps=2, num_checkpoints_kept=9)
    run_job(job)
    assert len(find_checkpoints(job.folder)) == 3
    return Path(job.folder)


def test_intermediate_checkpoints_go_and_the_finished_run_stays(finished_run, clean, tiny_job):
    earlier = ["runs/whole/step_00000002", "runs/whole/step_00000004"]
    assert clean("--dry-run") == earlier
    assert len(find_checkpoints(finished_run)) == 3
    assert clean("--yes") == earlier
    assert clean("--yes") == []
    [last] = find_checkpoints(finished_run)
    records = (finished_run / "journal.jsonl").read_text()
    job = tiny_job("runs/whole", num_steps=6, checkpoint_every_steps=2, num_checkpoints_kept=9)
    assert run_job(job).checkpoint == str(last)
    assert (finished_run / "journal.jsonl").read_text() == records, "it is not trained again"


def test_what_something_else_needs_stays(space, finished_run, clean):
    write_json(space.sweeps / "a" / "plan.json", {"teacher": "runs/whole/step_00000002"})
    (finished_run / "step_00000004" / "influence-cosine.json").write_text("{}")
    assert clean("checkpoints", "--yes") == []
    (finished_run / "step_00000004" / "influence-cosine.json").unlink()
    assert clean("checkpoints", "--dry-run") == ["runs/whole/step_00000004"]
    (space.sweeps / "a" / "plan.json").write_text('{"teacher": ')  # What it names is not known.
    assert clean("checkpoints", "--yes") == []


def test_what_a_run_continues_from_and_all_of_an_unfinished_run_stay(tiny_job, clean):
    recipe = {"num_steps": 8, "checkpoint_every_steps": 2, "num_checkpoints_kept": 9}
    run_job(tiny_job("runs/a", decay="wsd", decay_fraction=0.5, warmup_steps=1, **recipe))
    run_job(tiny_job("runs/b", **recipe), should_stop=stop_at(5))
    # The decay begins after step 4.
    assert clean("--yes") == ["runs/a/step_00000002", "runs/a/step_00000006"]


def test_what_a_process_holds_stays(space, finished_run, clean):
    with lock_run_folder(finished_run):
        assert clean("--yes") == []


def test_what_killed_processes_left_goes_but_not_what_is_being_written(space, clean):
    leftover = space.runs / ".a.0123456789abcdef.iiet-temporary"
    leftover.mkdir(parents=True)
    interrupted = space.tokens / ".writing-0123"
    interrupted.mkdir(parents=True)
    lock = space.tokens / "sources" / "0123.lock"
    with new_folder(space.runs / "b") as filling, lock_file(lock):
        leftover.mkdir(exist_ok=True)  # A writer deletes the leftovers beside it.
        assert clean("temporary", "--yes") == [str(leftover.relative_to(space.root))]
        assert filling.exists()
    assert clean("temporary", "--yes") == ["tokens/.writing-0123"]
    assert (space.runs / "b").is_dir()


def test_what_a_process_takes_while_others_are_deleted_stays(space, clean, monkeypatch):
    first, second = (space.tokens / f".writing-{key}" for key in ("01", "02"))
    for folder in (first, second):
        folder.mkdir(parents=True)
    delete = shutil.rmtree
    with ExitStack() as other_process:

        def delete_and_lose_the_next(path: Path) -> None:
            delete(path)
            lock = space.tokens / "sources" / "02.lock"
            other_process.enter_context(lock_file(lock, seconds=0.0))

        monkeypatch.setattr(shutil, "rmtree", delete_and_lose_the_next)
        assert clean("temporary", "--yes") == ["tokens/.writing-01"]
    assert second.is_dir()


def test_ray_folders_of_ended_commands_go(space, clean):
    killed = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, check=False)
    scratch = Path(killed.stdout.decode().strip())
    assert scratch.is_dir()
    running = space.sweeps / "running"
    ended = space.sweeps / "ended"
    for sweep in (running, ended):
        (sweep / RAY_FOLDER).mkdir(parents=True)
        (sweep / SWEEP_LOCK_NAME).touch()
    with lock_file(running / SWEEP_LOCK_NAME):
        assert clean("ray", "--yes") == [f"sweeps/ended/{RAY_FOLDER}"]
    assert not scratch.exists()
    assert (running / RAY_FOLDER).exists()


def test_damaged_checkpoints_go(space, finished_run, clean, capsys):
    weights = finished_run / "step_00000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with only_readable(space.root):
        assert cli.main(["clean", "damaged", "--yes", "-w", str(space.root)]) == 1
    assert "Permission denied" in capsys.readouterr().err
    assert clean("damaged", "--yes") == ["runs/whole/step_00000004"]


def test_it_asks_first(space, finished_run, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    # Only checkpoints: folders that other processes' Ray has left stand outside the workspace.
    command = ["clean", "checkpoints", "--workspace", str(space.root)]
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert cli.main(command) == 2
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", Terminal(""))
    assert cli.main(command) == 130, "an end of the input, or Ctrl-C"
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    assert cli.main(command) == 0
    assert len(find_checkpoints(finished_run)) == 3
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert cli.main(command) == 0
    assert "deleted 2 of 2" in capsys.readouterr().out
    assert len(find_checkpoints(finished_run)) == 1
