"""One process at a time holds a lock, and a process that ends gives it up."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.training.trainer import LOCK_SECONDS
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.locks import is_locked, lock_file, lock_holder, refuse_second

HOLDER = """
import sys
from pathlib import Path
from orchestrator.workspace.locks import lock_file
with lock_file(Path(sys.argv[1])) as is_ours:
    print(is_ours, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "folder" / "lock"


@pytest.fixture
def holder(path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_a_lock_is_released_at_the_end_of_its_block(path):
    assert not is_locked(path)
    with lock_file(path) as is_ours:
        assert is_ours
        assert is_locked(path)
        assert lock_holder(path) == os.getpid()
        with lock_file(path, seconds=0.0) as is_ours_again:
            assert not is_ours_again
    assert not is_locked(path)
    assert LOCK_SECONDS > 90.0, "network file systems release the locks of a lost node after that"


def test_a_lock_of_another_process_is_waited_for_and_its_holder_is_known(path, holder, monkeypatch):
    started = time.monotonic()
    with lock_file(path, seconds=0.1) as is_ours:
        assert not is_ours
        assert lock_holder(path) == holder.pid
    place = f"the sweep x runs already, in process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(UserError, match=re.escape(place)), refuse_second(path, "the sweep x"):
        pytest.fail("another process holds the lock")
    assert time.monotonic() - started >= 0.1
    with lock_file(path, should_stop=lambda: True) as is_ours:
        assert not is_ours, "the wait ends on request"
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "another-node")
        assert lock_holder(path) is None, "its id says nothing here"
    pids: list[int] = []

    def kill_then_stop() -> bool:
        pids.append(len(pids))
        if len(pids) == 2:
            holder.kill()
            holder.wait()
            assert path.read_text()
            assert lock_holder(path) is None, "the process that wrote its id has ended"
        return False

    with lock_file(path, should_stop=kill_then_stop) as is_ours:
        assert is_ours, "the system releases the lock of a killed process"
    assert len(pids) >= 2
    with refuse_second(path, "the sweep x"):
        assert lock_holder(path) == os.getpid(), "what a dead process wrote refuses nobody"


def test_a_process_that_only_looks_refuses_nobody(path, monkeypatch):
    with lock_file(path):
        pass
    looking = [os.open(path, os.O_RDONLY)]
    flock = fcntl.flock
    flock(looking[0], fcntl.LOCK_SH)

    def flock_while_somebody_looks(descriptor: int, operation: int) -> None:
        try:
            flock(descriptor, operation)
        finally:
            if operation & fcntl.LOCK_EX and looking:
                os.close(looking.pop())

    monkeypatch.setattr(fcntl, "flock", flock_while_somebody_looks)
    with refuse_second(path, "the sweep x"):
        assert not looking
        assert is_locked(path)
