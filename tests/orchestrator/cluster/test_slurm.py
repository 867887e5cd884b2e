"""The batch script runs its command, passes signals on, and queues itself again after SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_size import SMALL

from orchestrator.cluster.deployment import Deployment
from orchestrator.cluster.slurm import batch_script
from orchestrator.workspace.journal import read_journal

PATIENCE_SECONDS = 30
LONG_PATIENCE_SECONDS = 300
# What SLURM and Ray install, as programs that write what they are told into a file.
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$RECORD"
"""
SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
RAY = f"""#!{sys.executable}
import os, signal, socket, sys

def say(text):
    with open(os.environ["RECORD"], "a") as file:
        print(text, file=file)

def end(*_):
    say("ray ends")
    sys.exit()

signal.signal(signal.SIGTERM, end)
port = next(word.split("=")[1] for word in sys.argv if word.startswith("--port="))
host = next(word.split("=")[1] for word in sys.argv if word.startswith("--node-ip-address="))
server = socket.create_server((host, int(port)))
say(" ".join(["ray", *sys.argv[1:]]).replace(port, "PORT").replace(host, "HOST"))
while True:
    signal.pause()
"""
COMMAND = f"""#!{sys.executable}
import os, signal, socket, sys

def say(text):
    with open(os.environ["RECORD"], "a") as file:
        print(text, file=file)

def save(*_):
    host, port = os.environ["RAY_ADDRESS"].split(":")
    socket.create_connection((host, int(port))).close()
    say("saved while Ray runs")
    sys.exit(0 if "report" in sys.argv else 130)

signal.signal(signal.SIGTERM, save)
say(f"{{sys.argv[1:]}} {{os.environ['IIET_WORKSPACE']}} {{os.environ['RAY_AUTH_MODE']}}")
if "ui" in sys.argv:
    sys.exit(2)
while True:
    signal.pause()
"""
# Prints the head's address as Ray would, and waits until the head can be joined.
PYTHON = """#!/bin/bash
case "$2" in
    *ray.init*) until (: < "/dev/tcp/$head/$port") 2> /dev/null; do :; done ;;
    *) echo 127.0.0.1 ;;
esac
"""
PROGRAMS = {
    "scontrol": SCONTROL,
    "srun": SRUN,
    "ray": RAY,
    "iiet-orch": COMMAND,
    "python": PYTHON,
}


def free_job_id() -> int:
    """Return an id whose port is free."""
    while True:
        number = int.from_bytes(os.urandom(2), "big") % 10_000
        with suppress(OSError), socket.create_server(("", 20_000 + number)):
            return number


def wait_until(happened: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    (tmp_path / "record").touch()
    started = []

    def run(
        *words: str,
        programs: dict[str, str] = PROGRAMS,
        plan: dict[str, Any] | None = None,
        **changes: str,
    ) -> subprocess.Popen[str]:
        for name, text in programs.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(stat.S_IRWXU)
        script = tmp_path / "job.sh"
        script.write_text(make_script(*words, **plan or {}))
        path = f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}/usr/bin:/bin"
        variables = {
            "PATH": path,
            "RECORD": str(tmp_path / "record"),
            "SLURM_JOB_ID": str(free_job_id()),
            "SLURM_CPUS_PER_TASK": "64",
            "HF_TOKEN": "secret",
        }
        process = subprocess.Popen(
            ["bash", str(script)],
            env=variables | changes,
            cwd=tmp_path,  # Not a folder with other code of this package.
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def make_script(*words: str, **changes: Any) -> str:
    plan: dict[str, Any] = {
        "name": "iiet-pretrain",
        "words": ("iiet-orch", *words),
        "workspace": "/shared/my space",
        "num_nodes": 4,
        "gpus_per_node": 8,
        "cpus_per_node": 64,
        "memory_bytes": 2**30,
        "variables": ("HF_TOKEN",),
    }
    return batch_script(Deployment(**plan | changes), time_limit="12:00:00", partition="gpu")


def record(folder: Path) -> list[str]:
    return (folder / "record").read_text().splitlines()


def test_the_options_of_sbatch() -> None:
    options = [line for line in make_script("pretrain").splitlines() if line.startswith("#SBATCH")]
    for wanted in ("nodes=4", "ntasks-per-node=1", "gpus-per-node=8", "cpus-per-task=64",
                   "signal=B:TERM@180", "time=12:00:00", "partition=gpu", "requeue"):  # fmt: skip
        assert f"#SBATCH --{wanted}" in options


@pytest.mark.parametrize(
    ("number", "words", "exit_code", "requeued"),
    [
        (signal.SIGTERM, ["pretrain", "--set", "a=[b c]"], 130, ["scontrol requeue {}"]),
        (signal.SIGUSR1, ["pretrain"], 130, []),
        (signal.SIGTERM, ["report"], 0, []),  # It has just finished.
    ],
)
def test_a_signal_reaches_the_command_alone_which_saves_its_state(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: int, words: list[str],
    exit_code: int, requeued: list[str],
) -> None:  # fmt: skip
    job_id = str(free_job_id())
    script = start(*words, SLURM_JOB_ID=job_id)
    wait_until(lambda: len(record(tmp_path)) == 2)
    os.kill(script.pid, number)
    printed, _ = script.communicate(timeout=PATIENCE_SECONDS)
    assert script.returncode == exit_code, printed
    wait_until(lambda: "ray ends" in record(tmp_path))
    started, told, saved, *rest = record(tmp_path)
    assert started == (
        "ray start --block --head --node-ip-address=HOST --port=PORT --num-cpus=64 --num-gpus=8 "
        "--object-store-memory=2147483648"
    )
    assert told == f"{words} /shared/my space token"
    assert saved == "saved while Ray runs"
    assert sorted(rest) == ["ray ends", *(line.format(job_id) for line in requeued)]


def test_a_command_that_fails_ends_the_job_with_its_exit_code(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    assert start("ui").wait(PATIENCE_SECONDS) == 2
    wait_until(lambda: "ray ends" in record(tmp_path))
    assert not any(line.startswith("scontrol") for line in record(tmp_path))


def test_a_missing_variable_is_named_before_anything_starts(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    script = start("pretrain", HF_TOKEN="")
    printed, _ = script.communicate(timeout=PATIENCE_SECONDS)
    assert script.returncode == 1
    assert "HF_TOKEN: set it where sbatch is called" in printed
    assert not record(tmp_path)


@pytest.mark.long
def test_a_real_run_on_a_real_ray_saves_its_state_and_resumes(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    space = tmp_path / "space"
    changes = [*SMALL, "training.num_steps=100000", "training.checkpoint_every_steps=50000"]
    words = ["pretrain", *(word for change in changes for word in ("--set", change))]
    fakes = {"scontrol": SCONTROL, "srun": SRUN}
    one_node = {"num_nodes": 1, "gpus_per_node": 0, "cpus_per_node": 2, "workspace": str(space)}

    def names() -> list[str]:
        (run,) = [*space.glob("runs/*")] or [space]
        return [record["name"] for record in read_journal(run)[0] if "name" in record]

    for event in ("started", "resumed"):
        # Short: a socket's path has little room.
        with tempfile.TemporaryDirectory(prefix="iiet-", dir="/tmp") as scratch:
            script = start(*words, programs=fakes, plan=one_node, RAY_TMPDIR=scratch)

            def has_begun(event: str = event, script: subprocess.Popen[str] = script) -> bool:
                assert script.poll() is None, script.communicate()[0]
                return event in names()

            wait_until(has_begun, LONG_PATIENCE_SECONDS)
            processes = psutil.Process(script.pid).children(recursive=True)
            os.kill(script.pid, signal.SIGTERM)
            printed, _ = script.communicate(timeout=LONG_PATIENCE_SECONDS)
            assert script.returncode == 130, printed
            assert "saved at step" in printed
            _, alive = psutil.wait_procs(processes, timeout=LONG_PATIENCE_SECONDS)
            assert not alive
    assert [line.split()[:2] for line in record(tmp_path)] == [["scontrol", "requeue"]] * 2
