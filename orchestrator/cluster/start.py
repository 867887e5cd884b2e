"""Start Ray on this machine for a block of code, or join the cluster that the settings name.

A local Ray listens on loopback only, with a token of its own, in a short temporary folder (a
socket's path is limited to 107 characters). At the end, all of its processes are gone.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray

from orchestrator.cluster.environment import ray_environment, worker_variables
from orchestrator.cluster.joining import check_ray_can_run, joining_problem
from orchestrator.cluster.node_checks import check_nodes
from orchestrator.cluster.nodes import alive_nodes
from orchestrator.cluster.shared_memory import OBJECT_STORE_BYTES
from orchestrator.planning.machine import Resources, local_resources
from orchestrator.settings import ClusterSettings
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.stop import (
    POLL_SECONDS,
    SIGNALS,
    signal_handlers,
    stop_on_signals,
    stop_requested,
)
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
from orchestrator.workspace.files import ScratchFolder, make_scratch_folder

LONGEST_TEMPORARY_FOLDER = 40  # characters; Ray's folder and a socket add up to 66, of 107 at most
# After Ctrl-C everything together must take less than ten seconds.
INTERRUPTED_START_SECONDS = 2.0
INTERRUPTED_SHUTDOWN_SECONDS = 3.0
SHUTDOWN_SECONDS = 60.0  # after a normal end
EXIT_CODE_INTERRUPTED = 130


_running: Resources | None = None
"""What the jobs of the running Ray may use."""


@contextmanager
def ray_cluster(
    cluster: ClusterSettings | None = None,
    *,
    folder: Path | None = None,
    num_cpus: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[Resources]:
    """Start or join Ray until the block ends, or use the one that runs; yield what jobs may use.

    Args:
        cluster: Says which cluster is joined; the default settings when unset.
        folder: A folder that all nodes of that cluster must see, such as the workspace.
        num_cpus: CPUs of a local cluster; all that this process may use when unset.
        say: Called with a sentence before Ray starts, which takes seconds.

    Raises:
        UserError: If Ray cannot start here, the cluster cannot be joined, or one of its nodes
            cannot be used.
        RunFailed: If Ray does not start.
    """
    if _running is not None:
        yield replace(_running, nodes=alive_nodes())  # Nodes may have joined or left.
        return
    cluster = cluster or ClusterSettings()
    address = cluster.ray_address
    if say:
        say("starting Ray" if address == LOCAL else f"joining the Ray cluster at {address}")
    check_ray_can_run(address)
    scratch = make_scratch_folder(longest_path=LONGEST_TEMPORARY_FOLDER)
    if address == LOCAL:
        start = partial(_start_here, scratch.folder, num_cpus)
    else:
        start = partial(_join, address, folder)
    with ray_environment(address):
        variables = worker_variables(cluster.env, address)
        yield from _run_ray(partial(start, {"env_vars": variables} if variables else None), scratch)


def _run_ray(start: Callable[[], Resources], scratch: ScratchFolder) -> Iterator[Resources]:
    global _running
    thread = _RayThread(start, scratch)
    seconds = SHUTDOWN_SECONDS
    try:
        with signal_handlers((signal.SIGTERM, signal.SIGHUP), signal.default_int_handler):
            _running = thread.started()
            yield _running
    except (KeyboardInterrupt, Interrupted):
        seconds = INTERRUPTED_SHUTDOWN_SECONDS
        raise
    finally:
        _running = None
        with signal_handlers(SIGNALS, signal.SIG_IGN):
            thread.end(seconds)


class _RayThread:
    """A thread that starts Ray, waits, and shuts it down.

    The kernel ends Ray's processes with the thread that started them, so the thread stays. The main
    thread handles signals: one that interrupted `ray.init` would later crash the interpreter.
    """

    def __init__(self, start: Callable[[], Resources], scratch: ScratchFolder) -> None:
        self.start, self.scratch = start, scratch
        self._earlier = {process.pid for process in psutil.Process().children()}
        self._resources: Future[Resources] = Future()
        self._should_end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def started(self) -> Resources:
        """Start Ray and wait until it runs.

        Raises:
            KeyboardInterrupt: After a signal, once Ray runs and can be ended, or it took too long.
        """
        with stop_on_signals():
            self._thread.start()
            deadline = math.inf
            while not self._resources.done() and time.monotonic() < deadline:
                wait((self._resources,), timeout=POLL_SECONDS)
                if stop_requested():
                    deadline = min(deadline, time.monotonic() + INTERRUPTED_START_SECONDS)
            if stop_requested():
                raise KeyboardInterrupt
        return self._resources.result()

    def end(self, seconds: float) -> None:
        """Shut Ray down; kill processes that are left after `seconds`."""
        processes = self._ray_processes()
        self._should_end.set()
        if self._resources.done():
            self._thread.join(seconds)
        if self._thread.is_alive() and seconds < SHUTDOWN_SECONDS:
            # A native thread that is still busy would crash the interpreter's own end.
            atexit.register(_kill_and_exit, processes, self.scratch)
            return
        _, alive = psutil.wait_procs(processes, timeout=0.5)
        _kill(alive)
        self.scratch.delete()

    def _run(self) -> None:
        # Ray's processes inherit this. A closed terminal must not end them before they have saved.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            self._resources.set_result(self.start())
        except BaseException as error:
            self._resources.set_exception(error)
        self._should_end.wait()
        ray.shutdown()

    def _ray_processes(self) -> list[psutil.Process]:
        # Without other children of this process, and those from before the start.
        roots = [
            child
            for child in psutil.Process().children()
            if child.pid not in self._earlier and _is_ray(child)
        ]
        return [process for root in roots for process in (root, *_children(root))]


def _start_here(
    scratch: Path, num_cpus: int | None, runtime_env: dict[str, Any] | None
) -> Resources:
    resources = local_resources()
    _prepare_logging()
    try:
        ray.init(
            LOCAL,
            num_cpus=num_cpus or resources.cpus,
            num_gpus=resources.gpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            runtime_env=runtime_env,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=str(scratch / "r"),  # Ray opens its folder to every user: one inside ours.
        )
    except Exception as error:
        raise RunFailed(f"Ray did not start: {error}") from error
    return Resources(alive_nodes())


def _join(address: str, folder: Path | None, runtime_env: dict[str, Any] | None) -> Resources:
    _prepare_logging()
    try:
        ray.init(
            address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.WARNING
        )
    except Exception as error:
        raise UserError(joining_problem(error, address)) from error
    check_nodes(folder)
    return Resources(alive_nodes(), f"the cluster at {address}")


def _prepare_logging() -> None:
    _log_daemon_messages()
    # It would say that SIGTERM has no handler of Ray's in this thread; there is one of ours.
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)


def _log_daemon_messages() -> None:
    """Send messages of Ray's daemons, such as that a worker died, to the log.

    Ray has no setting for this. A version of Ray without this function writes to the terminal.
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


def _kill_and_exit(processes: list[psutil.Process], scratch: ScratchFolder) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    _kill(processes)
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
