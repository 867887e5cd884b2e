"""On a full disk a command ends with one sentence and exit code 1, and leaves no half file."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys

import pytest
from refusals import refused
from sample_trials import sample_trial

from orchestrator.cli.session import open_session
from orchestrator.reporting.results import StoredSweep
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.layout import open_workspace


def _wrapped() -> UserError:
    error = UserError("cannot write the folder; choose another")
    error.__context__ = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        sqlite3.OperationalError("database or disk is full"),
        _wrapped(),
    ],
)
def test_a_full_disk_is_reported_in_one_sentence(tmp_path, error):
    with (
        refused(RunFailed, tmp_path),
        open_session(tmp_path, "pretrain", verbose=None),
    ):
        raise error


FULL_DISK = """
import os, sys
from pathlib import Path
from orchestrator.cli.__main__ import main

disk = Path(sys.argv[1])
filler = disk / "filler"

def files():
    logs = (disk / "logs").glob("*")  # MLflow's own database may have begun.
    paths = set(disk.rglob("*")) - {*logs, disk / "mlflow.db"}
    return {path for path in paths if path.is_file() and path.suffix != ".lock"}

def run(*command):
    return main([*command, "--quiet", "--workspace", str(disk)])

for command in (["report"], ["export", "teacher", "--no-measure"], ["pick"]):
    try:
        filler.write_bytes(bytes(1 << 30))
    except OSError:
        pass
    before = files()
    print(command, run(*command), [str(path) for path in files() - before], flush=True)
    filler.unlink()
    print(command, run(*command), flush=True)
"""


@pytest.mark.slow
def test_a_command_on_a_full_disk_leaves_nothing_and_succeeds_once_there_is_space(
    tmp_path, save_tiny
):
    workspace = open_workspace(tmp_path / "workspace")
    models = {"teacher": ((2, 1), 5, 0.5), "student": ((1, 0), 3, 0.498)}
    StoredSweep(
        name="sweep",
        key="sweep",
        results=tuple(
            sample_trial(
                key=name, label=name, role="teacher" if name == "teacher" else "trial",
                schedule=schedule, cost={"evaluations": cost}, quality={"accuracy": accuracy},
                checkpoint=str(save_tiny(workspace.runs / name, schedule=schedule)),
            )
            for name, (schedule, cost, accuracy) in models.items()
        ),
    ).store(workspace)  # fmt: skip
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=8m tmpfs "$1" && cp -r "$2/." "$1" && exec "$3" -c "$4" "$1"'
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*shell, 'mount -t tmpfs tmpfs "$1"', "sh", disk], check=False).returncode:
        pytest.skip("this machine lets no user mount a small disk")
    arguments = ["sh", disk, workspace.root, sys.executable, FULL_DISK]
    done = subprocess.run(
        [*shell, mount, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    commands = (["report"], ["export", "teacher", "--no-measure"], ["pick"])
    expected = [line for words in commands for line in (f"{words} 1 []", f"{words} 0")]
    assert [line for line in done.stdout.splitlines() if line.startswith("['")] == expected, done
    errors = [line for line in done.stderr.splitlines() if line.startswith("iiet-orch: ")]
    assert len(errors) == 3
    assert all("no space" in line for line in errors)
    assert "Errno" not in done.stderr
