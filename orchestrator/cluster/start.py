"""Ray started so that it stays on this machine, stays quiet and leaves nothing behind.

`ray_cluster` starts Ray for a block of code, or joins the cluster that `RAY_ADDRESS` names. A local
one listens on loopback only, with a token of its own, in a short temporary folder (a socket's path
has little room). At the end, whatever ends it, every process that came with it is gone. Besides
this module only `worker.py` (training jobs), `process_group.py` (their workers' connections) and
`trial_runner.py` (sweeps) import ray.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray

from orchestrator.planning.resources import Resources, local_resources
from orchestrator.terminal.signals import (
    POLL_SECONDS,
    SIGNALS,
    raise_keyboard_interrupt,
    signal_handlers,
)
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
from orchestrator.workspace.scratch import ScratchFolder, make_scratch_folder

OBJECT_STORE_BYTES = 128 * 2**20  # data does not travel through Ray; its own minimum is 75 MB
LONGEST_TEMPORARY_FOLDER = 40  # characters; a socket's path adds up to 64, of 107 at most
# After Ctrl-C everything together must take less than ten seconds.
START_PATIENCE_SECONDS = 2.0
SHUTDOWN_PATIENCE_SECONDS = 3.0
CONNECT_SECONDS = 5.0
SHUTDOWN_SECONDS = 60.0  # when nobody is waiting
EXIT_CODE_INTERRUPTED = 130


@dataclass(frozen=True)
class Cluster:
    """A running Ray."""

    resources: Resources
    """What its jobs may use."""
    scratch: Path
    """Ray's own files; deleted at the end."""


_running: Cluster | None = None


@contextmanager
def ray_cluster(
    *, num_cpus: int | None = None, say: Callable[[str], None] | None = None
) -> Iterator[Cluster]:
    """Start Ray until the block ends, or use the one that runs already.

    Args:
        num_cpus: CPUs of a local cluster; all that this process may use when unset.
        say: Told that Ray starts, if it does; that takes seconds.

    Raises:
        UserError: If nothing answers at `RAY_ADDRESS`.
        RunFailed: If Ray does not start.
    """
    global _running
    if _running is not None:
        yield _running
        return
    if say:
        say("starting Ray")
    cluster = _RayThread(make_scratch_folder(longest_path=LONGEST_TEMPORARY_FOLDER), num_cpus)
    patience = SHUTDOWN_SECONDS
    try:
        with signal_handlers((signal.SIGTERM,), raise_keyboard_interrupt):
            _running = cluster.started()
            yield _running
    except (KeyboardInterrupt, Interrupted):
        patience = SHUTDOWN_PATIENCE_SECONDS
        raise
    finally:
        _running = None
        with signal_handlers(SIGNALS, signal.SIG_IGN):
            cluster.end(patience)


class _RayThread:
    """Ray's life, from start to end, in one thread of its own.

    The kernel ends Ray's processes with the thread that started them, so the thread stays. The main
    thread stays free for signals: one that interrupts `ray.init` half-way leaves a state that
    crashes the interpreter.
    """

    def __init__(self, scratch: ScratchFolder, num_cpus: int | None) -> None:
        self.scratch, self.num_cpus = scratch, num_cpus
        self._earlier = {process.pid for process in psutil.Process().children()}
        self._resources: Future[Resources] = Future()
        self._to_end = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def started(self) -> Cluster:
        """Start Ray and wait until it runs.

        Raises:
            KeyboardInterrupt: After a signal, once Ray runs and can be ended, or patience is over.
        """
        signals: list[int] = []
        with signal_handlers(SIGNALS, lambda number, _: signals.append(number)):
            self._thread.start()
            give_up_at = math.inf
            while not self._resources.done() and time.monotonic() < give_up_at:
                wait((self._resources,), timeout=POLL_SECONDS)
                if signals:
                    give_up_at = min(give_up_at, time.monotonic() + START_PATIENCE_SECONDS)
        if signals:
            raise KeyboardInterrupt
        return Cluster(self._resources.result(), self.scratch.folder)

    def end(self, patience: float) -> None:
        """End Ray, by force what does not end by itself within `patience` seconds."""
        family = self._family()
        self._to_end.set()
        if self._resources.done():
            self._thread.join(patience)
        if self._thread.is_alive() and patience < SHUTDOWN_SECONDS:
            # A native thread that is still busy would crash the interpreter's own end.
            atexit.register(_leave, family, self.scratch)
            return
        _, alive = psutil.wait_procs(family, timeout=0.5)
        _kill(alive)
        self.scratch.delete()

    def _live(self) -> None:
        try:
            self._resources.set_result(_start(self.scratch.folder, self.num_cpus))
        except BaseException as error:
            self._resources.set_exception(error)
        self._to_end.wait()
        ray.shutdown()

    def _family(self) -> list[psutil.Process]:
        """Return Ray's processes, not children of another kind or from before the start."""
        roots = [
            child
            for child in psutil.Process().children()
            if child.pid not in self._earlier and _is_ray(child)
        ]
        return [process for root in roots for process in (root, *_children(root))]


def _start(scratch: Path, num_cpus: int | None) -> Resources:
    address = os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    if address == "local":
        resources = local_resources()
        resources = replace(resources, cpus=num_cpus or resources.cpus)
        options = {
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(scratch),
        }
    else:
        _check_reachable(address)
    _keep_off_standard_output()
    # It would say that SIGTERM has no handler of Ray's in this thread; there is one of ours.
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **options)
    except Exception as error:
        raise RunFailed(f"Ray did not start ({address}): {error}") from error
    if address != "local":
        found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cpus, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
        resources = Resources(cpus, gpus, f"the cluster at {address}")
    return resources


def _check_reachable(address: str) -> None:
    """Refuse a dead address at once; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (port.isascii() and port.isdigit()):
        return  # `auto`: Ray looks for a cluster on this machine.
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:  # The second: a port that is none.
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({reason}); "
            "start it, correct the address, or unset RAY_ADDRESS to use this machine"
        ) from None


def _keep_off_standard_output() -> None:
    """Send what Ray's daemons say, such as that a worker died, to the log instead of the terminal.

    Ray offers no setting for it; without this function of Ray's, its messages would go where they
    went.
    """
    internals: Any = ray._private.worker
    if hasattr(internals, "print_to_stdstream"):
        internals.print_to_stdstream = _log_message


def _log_message(data: dict[str, Any], *_: Any, **__: Any) -> None:
    logging.getLogger("ray").warning("(%s) %s", data.get("pid"), "\n".join(data.get("lines", [])))


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _leave(family: list[psutil.Process], scratch: ScratchFolder) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    _kill(family)
    scratch.delete()
    os._exit(EXIT_CODE_INTERRUPTED)


def _is_ray(process: psutil.Process) -> bool:
    try:
        return any("/ray/" in part or part.startswith("ray::") for part in process.cmdline())
    except psutil.Error:
        return False


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
