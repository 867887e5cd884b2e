"""Jobs of a real head with Ray's job server: submitted, followed, listed and stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest
from pretended_cluster import environment_without_ray

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-this-test-and-of-nothing-else"
OWN_CODE = """
import os, pathlib, signal, sys, time

def main():
    space = pathlib.Path(os.environ["IIET_WORKSPACE"])
    print("own code:", *sys.argv[1:], os.environ["COLOR"])
    if sys.argv[1] == "report":
        return 3

    def save(*_):
        time.sleep(4)  # Longer than Ray's own limit of three seconds.
        (space / "saved").touch()
        sys.exit(130)

    signal.signal(signal.SIGTERM, save)
    (space / "ready").touch()
    while True:
        signal.pause()
"""
PATIENCE_SECONDS = 120


def free_port() -> int:
    # Below those that Ray gives to its workers.
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = 2000 + int.from_bytes(os.urandom(2), "big") % 7000
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a head's job server, which asks for a token."""
    port, dashboard, client, agent = (free_port() for _ in range(4))
    command = [
        *("ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        *("--num-cpus=1", "--num-gpus=0", f"--object-store-memory={80 * 2**20}"),
    ]
    with tempfile.TemporaryDirectory(prefix="iiet-", dir="/tmp") as scratch:
        output = Path(scratch) / "output"
        with output.open("w") as file:
            variables = environment(RAY_TMPDIR=scratch, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0")
            head = subprocess.Popen(
                command, env=variables, cwd=scratch, stdout=file, stderr=subprocess.STDOUT
            )
        started = psutil.Process(head.pid)
        address = f"http://127.0.0.1:{dashboard}"

        def answers() -> bool:
            assert head.poll() is None, output.read_text()
            try:
                urllib.request.urlopen(address, timeout=1).close()
            except OSError as error:
                return isinstance(error, HTTPError)
            return True

        try:
            wait_until(answers)
            yield address
        finally:
            processes = started.children(recursive=True)
            head.terminate()
            with suppress(subprocess.TimeoutExpired):
                head.wait(10)
            for process in [started, *processes]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait()
            psutil.wait_procs(processes)


def environment(**changes: str) -> dict[str, str]:
    kept = environment_without_ray()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    return {**kept, "PATH": path, **token, **changes}


def start(server: str, folder: Path, *words: str, **changes: str) -> subprocess.Popen[str]:
    """Start a command in a folder, with a workspace of that folder's name."""
    workspace = folder.parent / f"{folder.name}-workspace"
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "orchestrator.cli", *words],  # -P: not the code in `folder`
        cwd=folder,
        env=environment(
            PYTHONPATH=os.pathsep.join(path for path in sys.path if path),
            RAY_API_SERVER_ADDRESS=server,
            RAY_ADDRESS="127.0.0.1:1",  # Of a cluster that this command does not need.
            IIET_WORKSPACE=str(workspace),
            COLOR="blue",
            **changes,
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert "Traceback" not in printed
    return process.returncode, printed


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A working directory with settings, and one with code of its own."""
    settings, code = tmp_path / "settings", tmp_path / "code"
    settings.mkdir()
    (settings / "own.yaml").write_text("training: {num_steps: 77}\n")
    (code / "orchestrator" / "cli").mkdir(parents=True)
    (code / "orchestrator" / "__init__.py").touch()
    (code / "orchestrator" / "cli" / "__init__.py").write_text(OWN_CODE)
    (tmp_path / "code-workspace").mkdir()
    return settings, code


@pytest.mark.long
def test_a_job_runs_in_a_copy_of_the_working_directory_and_can_be_stopped(
    server: str, folders: tuple[Path, Path]
) -> None:
    settings, code = folders
    space = code.parent / "code-workspace"
    long = start(server, code, "submit", "--env", "COLOR", "--name", "long", "pretrain")
    submitted = [
        start(server, settings, "submit", "pretrain", "--dry-run", "--config", "own.yaml"),
        start(server, code, "submit", "--env", "COLOR", "report", "a b"),
    ]
    (planned, plan), (failed, output) = map(end, submitted)
    assert planned == 0, plan
    assert "77 steps" in " ".join(plan.split())
    assert failed == 3, output
    assert "own code: report a b blue" in output

    wait_until((space / "ready").exists)
    _, listed = end(start(server, code, "jobs", "list"))
    jobs = {line.split()[0]: line for line in listed.splitlines()[1:] if " pretrain" in line}
    (name,) = (job for job in jobs if job.startswith("long-"))
    assert " running " in jobs[name]
    assert long.stdout
    assert any(line.startswith("own code: pretrain") for line in long.stdout)
    long.send_signal(signal.SIGINT)
    interrupted, said = end(long)
    assert interrupted == 130
    assert f"the job {name} goes on" in said

    follower = start(server, code, "jobs", "logs", name)
    stopped, said = end(start(server, code, "jobs", "stop", name))
    assert (stopped, said.splitlines()[-1]) == (0, f"{name}: STOPPED")
    assert (space / "saved").exists()
    assert end(follower)[0] == 130


def test_a_mistake_is_one_sentence(server: str, folders: tuple[Path, Path]) -> None:
    mistakes = {
        "has no job 'nothing'": start(server, folders[0], "jobs", "stop", "nothing"),
        "asks for a token, and it refuses": start(
            server, folders[0], "jobs", "list", RAY_AUTH_TOKEN="wrong" * 8
        ),
        "asks for a token, and none is set": start(
            server, folders[0], "jobs", "list", RAY_AUTH_MODE="disabled"
        ),
    }
    for sentence, process in mistakes.items():
        code, printed = end(process)
        assert code == 2
        assert sentence in printed
        assert len(printed.splitlines()) == 1


def test_without_the_client_the_extra_is_named(server: str) -> None:
    program = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "from orchestrator import cli\n"
        f"sys.exit(cli.main(['jobs', 'list', '--server', '{server}']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'iiet-orch[cluster]'" in done.stderr
