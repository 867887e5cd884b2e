"""Let the workers of a Ray start at once: fork them from a process that has imported much.

Each trial and each worker of a training is a process of its own, whose imports take four CPU
seconds. Ray lets its user choose the program of its workers. Here it is this file, in two roles:
the program sends the words, the environment and the open files of a worker to a server, which forks
a process that becomes the worker. Ray knows a worker by an id among its words, not by its process.
Each worker imports Ray itself, which reads there which job it serves, and draws what the random
names of its tasks begin with.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADDRESS_VARIABLE = "IIET_FORKED_RAY_WORKERS"
"""Where the server listens, while Ray starts."""
THIS_FILE = str(Path(__file__).resolve())


@contextmanager
def forked_workers(folder: Path) -> Iterator[dict[str, str]]:
    """Yield variables; a Ray that starts with them forks its workers, until the block ends.

    Args:
        folder: Where the server's socket is put.
    """
    from commands import ONE_THREAD, PRELOADED_BUT_RAY

    address = str(folder / "workers")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(100)
        descriptor = listener.fileno()
        # With `-P`, workers cannot import tests, as those of a user.
        words = [sys.executable, "-P", THIS_FILE, "serve", str(descriptor), *PRELOADED_BUT_RAY]
        variables = os.environ | ONE_THREAD
        server = subprocess.Popen(
            words, env=variables, stdin=subprocess.PIPE, pass_fds=[descriptor]
        )
    with server:  # Its input ends with the block.
        yield {
            ADDRESS_VARIABLE: address,
            # Ray calls this function with what its workers run in.
            "RAY_RUNTIME_ENV_HOOK": f"{__name__}.with_forks",
        }


def with_forks(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Return what Ray's workers run in, with this file as their program."""
    # Without `site`, which looks for packages, it starts in a few hundredths of a second.
    words = (sys.executable, "-IS", THIS_FILE, "request", os.environ[ADDRESS_VARIABLE])
    return {**(runtime_env or {}), "py_executable": shlex.join(words)}


def request(address: str, words: list[str]) -> None:
    """Ask the server for a worker in the place of this process."""
    blocked_signals = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    place = [words, dict(os.environ), str(Path.cwd()), blocked_signals]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b"."], [0, 1, 2])
        connection.sendall(json.dumps(place).encode())


def serve(listener: socket.socket, modules: Iterable[str]) -> None:
    """Fork a worker for each request, until the input ends."""
    import psutil  # Not each program has to.

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody asks how a worker ended.
    for module in modules:
        importlib.import_module(module)
    assert "ray" not in sys.modules
    gc.freeze()  # What is never looked at is not copied.
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        with connection:
            _, files, *_ = socket.recv_fds(connection, 1, 3)
            with connection.makefile() as text:
                request_text = text.read()
        if not request_text.endswith("]"):  # Whoever asked was killed meanwhile.
            for file in files:
                os.close(file)
            continue
        words, environment, folder, blocked_signals = json.loads(request_text)
        if os.fork() == 0:
            listener.close()
            _be_worker(words, environment, folder, files, blocked_signals)
            return
        for file in files:
            os.close(file)
    for worker in psutil.Process().children():  # Those that were forked while Ray ended.
        worker.kill()


def _be_worker(
    words: list[str],
    environment: dict[str, str],
    folder: str,
    files: list[int],
    blocked_signals: list[int],
) -> None:
    """Take the place of the process that sent the request, and run what it was to run."""
    os.setpgid(0, 0)  # A group of its own, as Ray gives each worker.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked_signals)
    random.seed()  # All workers would draw the same numbers.
    sys.modules["numpy"].random.seed()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    role, place, *more = sys.argv[1:]
    if role == "request":
        request(place, more)
    else:
        serve(socket.socket(fileno=int(place)), more)
