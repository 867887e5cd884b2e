"""Run commands of the program, and Python texts, in processes of their own that start at once.

A process that has imported everything, the server, is forked for each of them: the imports take
about four CPU seconds, which every new Python would pay. The server has a single thread, as a fork
of several may hang; what makes NumPy and Arrow start more is switched off. What is read from the
environment while modules are imported, needs a new Python.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

PRELOADED_BUT_RAY = [
    *("orchestrator.cli", "torch", "mlflow", "datasets", "transformers", "lm_eval"),
    *("optuna", "altair"),
    # PyTorch imports the first two at the first step.
    *("torch._dynamo", "torch.distributed.fsdp", "orchestrator.training.shards"),
    *("orchestrator.training.trainer", "orchestrator.sweeping.trial"),
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [*PRELOADED_BUT_RAY, "orchestrator.sweeping.sweep", "ray.train", "ray.tune"]
)
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Variables of the server; without them NumPy and Arrow start threads when they are imported."""
PATIENCE_SECONDS = 400


def wait_until(has_come: Callable[[], object], state: Callable[[], object] | None = None) -> None:
    """Wait until something has happened, but not for ever.

    Args:
        state: Returns what there is instead, for the message if it does not happen.
    """
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not has_come():
        assert time.monotonic() < give_up_at, ("it did not happen in time", state and state())
        time.sleep(0.05)


class Started:
    """A process, to be used as one of `subprocess.Popen`; all that it prints is `stdout`.

    Args:
        words: The words after `iiet-orch`, or the arguments of `code`.
        code: A Python text to run instead of a command.
        folder: Where it runs; here if unset.
        environment: Its variables; those of this process if unset.
        own_session: Whether signals to this process's group do not reach it.
    """

    def __init__(
        self,
        *words: str,
        code: str | None = None,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        own_session: bool = False,
    ) -> None:
        os.environ.update(ONE_THREAD)
        input_reader, input_writer = CONTEXT.Pipe(duplex=False)
        output_reader, output_writer = CONTEXT.Pipe(duplex=False)
        variables = dict(os.environ if environment is None else environment)
        where = str(folder or Path.cwd())
        self._process = CONTEXT.Process(
            target=_run,
            args=(words, code, where, variables, own_session, input_reader, output_writer),
        )
        self._process.start()
        input_reader.close()
        output_writer.close()
        self.stdin = os.fdopen(os.dup(input_writer.fileno()), "w", encoding="utf-8")
        self.stdout = os.fdopen(os.dup(output_reader.fileno()), encoding="utf-8", errors="replace")
        input_writer.close()
        output_reader.close()
        assert self._process.pid
        self.pid = self._process.pid

    def __del__(self) -> None:
        """Close the pipes, which warn if they are left open."""
        for pipe in (self.stdin, self.stdout):
            with suppress(OSError):  # What was typed last has no reader any more.
                pipe.close()

    @property
    def returncode(self) -> int | None:
        """The exit code; the negative number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("iiet-orch", timeout or 0.0)
        return self._process.exitcode

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait while this process runs, until something has happened."""

        def has_come() -> object:
            happened = condition()
            assert happened or self.poll() is None, self.communicate()[0]
            return happened

        wait_until(has_come)

    def communicate(self, timeout: float = PATIENCE_SECONDS) -> tuple[str, str]:
        """Close its input, wait for its end, and return what it printed, and an empty text."""
        self.stdin.close()
        printed: list[str] = []
        reader = Thread(target=lambda: printed.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if not printed:
            raise subprocess.TimeoutExpired("iiet-orch", timeout)
        self.wait(timeout)
        return printed[0], ""

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run_command(
    *words: str,
    code: int = 0,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a command until it ends with an exit code, and return what it printed."""
    started = Started(*words, folder=folder, environment=environment)
    printed, _ = started.communicate()
    assert started.returncode == code, printed
    return printed


WITHOUT_PACKAGES = """
import sys

import huggingface_hub.constants
import transformers.dynamic_module_utils

# These were read from the environment when the server of the forks imported them.
huggingface_hub.constants.HF_HUB_OFFLINE = True
transformers.dynamic_module_utils.HF_MODULES_CACHE = FOLDER_OF_CODE
for name in [*sys.modules]:
    if name.partition(".")[0] in HIDDEN:
        del sys.modules[name]
sys.modules.update(dict.fromkeys(HIDDEN))  # Any import of them fails from here on.
"""


def run_without(
    packages: Iterable[str],
    code: str,
    *arguments: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a Python text in a process that cannot import some packages; return what it printed.

    It cannot ask the hub either, and code of models is copied to the folder `modules` here.
    """
    hide = WITHOUT_PACKAGES.replace("HIDDEN", repr(sorted(packages)))
    hide = hide.replace("FOLDER_OF_CODE", repr(str(folder / "modules")))
    started = Started(*arguments, code=hide + code, folder=folder, environment=environment)
    printed, _ = started.communicate()
    assert started.returncode == 0, printed
    return printed


def run_here(*words: str, workspace: Path) -> str:
    """Run a command in this process, and return what it printed."""
    from orchestrator.cli import main

    with redirect_stdout(StringIO()) as printed, redirect_stderr(printed):
        code = main([*words, "--workspace", str(workspace)])
    logs = sorted((workspace / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
    assert code == 0, printed.getvalue() + "".join(log.read_text()[-4000:] for log in logs[-1:])
    return printed.getvalue()


def run_workers(code: str, number: int, *arguments: str) -> None:
    """Run a Python text in several processes at once, each with its rank as the first argument."""
    started = [Started(str(rank), *arguments, code=code) for rank in range(number)]
    for process in started:
        printed, _ = process.communicate()
        assert process.returncode == 0, printed


def settings_options(settings: Iterable[str], command: str, kind: str = "") -> list[str]:
    """Return `--set` options of the values that a command reads, such as `training.seed=3`.

    Args:
        command: Name of the command.
        kind: Kind of the sweep, if the command runs one of a file.
    """
    from orchestrator.cli.session import is_read
    from orchestrator.cli.train import READ_BY_KIND

    reads = READ_BY_KIND[kind] if kind else all_commands()[command].callback.reads
    return [f"--set={value}" for value in settings if is_read(value.partition("=")[0], reads)]


def all_commands() -> dict[str, Any]:
    """Return the commands by their names, such as `config show`."""
    from typer.main import get_command

    from orchestrator import cli

    commands = get_command(cli.commands).commands
    shown = {f"config {name}": command for name, command in commands["config"].commands.items()}
    return {name: command for name, command in commands.items() if name != "config"} | shown


def _run(
    words: tuple[str, ...],
    code: str | None,
    folder: str,
    environment: dict[str, str],
    own_session: bool,
    input_reader: Connection,
    output_writer: Connection,
) -> None:
    """Be the new process: take its place, run, and end as a Python of its own would."""
    threads = [*Path("/proc/self/task").iterdir()] if sys.platform == "linux" else [None]
    assert len(threads) == 1, "a fork of a process with several threads may hang"
    if own_session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(input_reader.fileno(), 0)
    os.dup2(output_writer.fileno(), 1)
    os.dup2(output_writer.fileno(), 2)
    input_reader.close()
    output_writer.close()
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.argv = ["iiet-orch" if code is None else "-c", *words]
    # Tests that were started in the background of a shell inherit that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ending = 0
    try:
        if code is None:
            from orchestrator.cli import main

            ending = main(list(words))
        else:
            exec(compile(code, "<text>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # A forked process does not call them.
        sys.stdout.flush()
    sys.exit(ending)
