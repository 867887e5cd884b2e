"""On a full disk a command ends with one sentence and exit code 1, and leaves no half file."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess

import pytest
from commands import Started
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
import ctypes, os, shutil, subprocess, sys
from pathlib import Path
from orchestrator.cli.__main__ import main

# A disk of 8 MB that this process alone sees, as `unshare --user --map-root-user --mount` gives it.
disk, workspace = map(Path, sys.argv[1:])
maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
new_user, new_mounts = 0x10000000, 0x00020000
assert ctypes.CDLL(None).unshare(new_user | new_mounts) == 0
for name, text in maps.items():
    Path("/proc/self", name).write_text(text)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
shutil.copytree(workspace, disk, dirs_exist_ok=True)
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
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*shell, 'mount -t tmpfs tmpfs "$1"', "sh", disk], check=False).returncode:
        pytest.skip("this machine lets no user mount a small disk")
    process = Started(str(disk), str(workspace.root), code=FULL_DISK)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    lines = printed.splitlines()
    commands = (["report"], ["export", "teacher", "--no-measure"], ["pick"])
    expected = [line for words in commands for line in (f"{words} 1 []", f"{words} 0")]
    assert [line for line in lines if line.startswith("['")] == expected, printed
    errors = [line for line in lines if line.startswith("iiet-orch: ")]
    assert len(errors) == 3
    assert all("no space" in line for line in errors)
    assert "Errno" not in printed
