"""A training that `ray job submit` gives to a head with a token, as docs/scaling.md says: stopped
after its checkpoint, and resumed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from commands import settings_options, wait_until
from pretended_cluster import environment_without_ray
from small_size import SMALL

from orchestrator.workspace.journal import read_journal

TOKEN = "a-token-of-this-test-and-of-nothing-else"


def free_port() -> int:
    # Below those that Ray gives to its workers.
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = 2000 + int.from_bytes(os.urandom(2), "big") % 7000
            probe.bind(("127.0.0.1", port))
            return port


def start(*words: str, folder: Path, **changes: str) -> subprocess.Popen[str]:
    """Start a program of this environment, `ray` or `iiet-orch`."""
    programs = Path(sys.executable).parent
    variables = {
        **environment_without_ray(),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        **changes,
    }
    return subprocess.Popen(
        words,
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def server() -> Iterator[str]:
    """The address of the job server of a head that asks for a token."""
    port, dashboard, client, agent = (free_port() for _ in range(4))
    with tempfile.TemporaryDirectory(prefix="iiet-", dir="/tmp") as scratch:
        head = start(
            *("ray", "start", "--head", "--block", f"--port={port}"),
            *(f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
            *(f"--dashboard-agent-listen-port={agent}", "--num-cpus=2", "--num-gpus=0"),
            f"--object-store-memory={80 * 2**20}",
            folder=Path(scratch),
            RAY_TMPDIR=scratch,
            RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
        )
        started = psutil.Process(head.pid)
        address = f"http://127.0.0.1:{dashboard}"

        def has_agent() -> bool:
            """Say whether the agent that starts jobs is up; the agent comes after the server."""
            probe = start(
                "ray", "job", "submit", "--address", address, "true", folder=Path(scratch)
            )
            probe.communicate()
            return probe.returncode == 0

        try:
            wait_until(has_agent)
            yield address
        finally:
            processes = [started, *started.children(recursive=True)]
            head.terminate()
            psutil.wait_procs(processes, timeout=10)
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            head.communicate()


@pytest.mark.long
def test_a_submitted_training_is_stopped_after_its_checkpoint_and_resumes(server, tmp_path):
    folder = tmp_path / "folder"
    space = tmp_path / "space"
    folder.mkdir()
    (folder / "own.yaml").write_text("training: {num_steps: 100000}\n")
    changes = [*SMALL, "training.num_steps=100000", "training.checkpoint_every_steps=50000"]
    words = ["pretrain", "--config", "own.yaml"]
    words += [*settings_options(changes, "pretrain"), "--workspace", str(space)]
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": "3600"}
    submit = ["ray", "job", "submit", "--address", server, "--working-dir", "."]
    submit += ["--runtime-env-json", json.dumps({"env_vars": environment})]

    def events() -> list[str]:
        return [
            record["name"]
            for run in space.glob("runs/*")
            for record in read_journal(run)[0]
            if "name" in record
        ]

    for event in ("started", "resumed"):
        name = f"training-{event}"
        job = start(*submit, "--submission-id", name, "--", "iiet-orch", *words, folder=folder)

        def has_begun(event: str = event, job: subprocess.Popen[str] = job) -> bool:
            assert job.poll() is None, job.communicate()[0]
            return event in events()

        wait_until(has_begun)
        stop = start("ray", "job", "stop", "--address", server, name, folder=folder)
        stopped, _ = stop.communicate()
        assert stop.returncode == 0, stopped
        printed, _ = job.communicate()
        assert "saved at step" in printed
