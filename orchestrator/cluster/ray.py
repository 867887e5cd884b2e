"""Start Ray on this machine for a block of code, or join the cluster that the settings name.

A local Ray listens only on loopback, with its own token, in a temporary folder with a short name (a
socket's path is limited to 107 characters). At the end, all of its processes have ended. The nodes
of a joined cluster are checked before they get work (`nodes.py`).
"""

from __future__ import annotations

import atexit
import fnmatch
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from traceback import format_exception
from typing import Any

import psutil

from orchestrator.cluster import PRETENDED_GPUS
from orchestrator.cluster.nodes import check_nodes
from orchestrator.cluster.placement import alive_nodes
from orchestrator.planning.machine import THIS_MACHINE, Resources, local_resources
from orchestrator.settings import ClusterSettings
from orchestrator.settings.cluster import ADDRESS_VARIABLE, AUTO, LOCAL
from orchestrator.terminal.stop import (
    POLL_SECONDS,
    SIGNALS,
    signal_handlers,
    stop_on_signals,
    stop_requested,
)
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
from orchestrator.workspace.files import make_scratch_folder

LONGEST_TEMPORARY_FOLDER = 38  # characters; Ray's folder and a socket add up to 68, of 107 at most
OBJECT_STORE_BYTES = 128 * 2**20
"""Object store of a local Ray, which transports no data; Ray's minimum is 75 MB."""
CONNECT_SECONDS = 5.0
# After Ctrl-C everything together must take less than ten seconds.
INTERRUPTED_START_SECONDS = 2.0
INTERRUPTED_SHUTDOWN_SECONDS = 3.0
SHUTDOWN_SECONDS = 60.0  # after a normal end
EXIT_CODE_INTERRUPTED = 130


# Environment of Ray and its processes

LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Variable that Ray reads at import; with 0 its sockets stay on loopback, also on Linux."""
WATCHER_SWITCH = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Variable of Ray Train's process that watches for announced losses of nodes."""
AUTO_START_SWITCH = "RAY_ENABLE_AUTO_CONNECT"
"""Variable that Ray reads at import. With 0, a late call after the end of our Ray raises an error;
otherwise it would start another Ray."""
_LOCAL_ENVIRONMENT = {
    AUTO_START_SWITCH: "0",
    "RAY_AUTH_MODE": "token",
    # One token for this process and its children; Ray would write one into the home folder.
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    LOOPBACK_SWITCH: "0",
    "RAY_prestart_worker_first_driver": "0",  # no idle workers, which nothing would use
    "RAY_enable_worker_prestart": "0",
    # The only node cannot be lost by itself: a busy or sleeping machine must not end a run.
    "RAY_health_check_failure_threshold": "60",
    # Other programs need memory, too; Ray's default threshold is 0.95.
    "RAY_memory_usage_threshold": "0.98",
    WATCHER_SWITCH: "0",
}
_JOINING_ENVIRONMENT = {
    AUTO_START_SWITCH: "0",
    "RAY_gcs_server_port_wait_time_s": "8",  # tries to reach the head node, about one a second
}
_imported_for_local: bool | None = None
"""Whether Ray was imported with the environment of a local Ray; None: it was not imported."""


def address_variables(address: str) -> dict[str, str | None]:
    """Return the environment variables of a local or joined Ray; None: not set.

    The user's values stay, except `RAY_ADDRESS`, which parts of Ray read themselves.
    """
    defaults = _LOCAL_ENVIRONMENT if address == LOCAL else _JOINING_ENVIRONMENT
    variables: dict[str, str | None] = {
        name: os.environ.get(name) or value
        for name, value in defaults.items()
        if name != "RAY_AUTH_TOKEN" or not os.environ.get("RAY_AUTH_TOKEN_PATH")
    }
    return variables | {ADDRESS_VARIABLE: None if address in (LOCAL, AUTO) else address}


@contextmanager
def ray_environment(address: str, folder: Path | None = None) -> Iterator[None]:
    """Set the variables of a local or joined Ray in a block in which Ray is imported.

    Args:
        folder: A private folder for the files of a local Ray, which makes its own folder in it
            readable for every user.

    Raises:
        UserError: If Ray was imported before with the environment of the other kind.
    """
    global _imported_for_local
    if _imported_for_local is None and "ray" in sys.modules:
        _imported_for_local = os.environ.get(LOOPBACK_SWITCH) == "0"
    if _imported_for_local not in (None, address == LOCAL):
        raise UserError(
            "this process has imported Ray in another environment: a local one is kept on loopback "
            f"by {LOOPBACK_SWITCH}=0, with which no cluster can be joined; start another process, "
            "in which orchestrator is imported before Ray"
        )
    variables = address_variables(address)
    if folder:
        variables["RAY_TMPDIR"] = str(folder)
    before = {name: os.environ.get(name) for name in variables}

    def set_all(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    set_all(variables)
    try:
        yield
    finally:
        if "ray" in sys.modules:
            _imported_for_local = address == LOCAL
        set_all(before)


def worker_variables(entries: Iterable[str], address: str) -> dict[str, str]:
    """Return the variables that `cluster.env` passes to Ray's workers.

    Workers of a local Ray inherit this process's environment anyway.
    """
    variables = {}
    for entry in (PRETENDED_GPUS, *entries):
        name, is_set, value = entry.partition("=")
        if is_set:
            variables[name] = value
        elif address != LOCAL:
            variables |= {known: os.environ[known] for known in fnmatch.filter(os.environ, name)}
    return variables


# Start and end


class RayThread:
    """A thread that starts or joins Ray, and shuts it down.

    One thread does both, because the kernel ends Ray's processes with the thread that started them.
    It is not the main thread: a signal that interrupted `ray.init` would later crash the
    interpreter.
    """

    def __init__(
        self, connect: Callable[[], Resources], clean_up: Callable[[], None] = lambda: None
    ) -> None:
        """Prepare the thread.

        Args:
            connect: Starts or joins Ray, and returns what jobs may use.
            clean_up: Called after the shutdown, or after its time limit.
        """
        self._connect = connect
        self._clean_up = clean_up
        self._connected: Future[Resources] = Future()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        # Ray's processes inherit this: a closed terminal must not end them before they have saved.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            self._connected.set_result(self._connect())
        except BaseException as error:
            self._connected.set_exception(error)
        self._is_over.wait()
        import ray

        ray.shutdown()

    def start(self) -> Resources:
        """Start or join Ray, and return what jobs may use.

        Raises:
            KeyboardInterrupt: After Ctrl-C or SIGTERM. Ray may still be starting.
        """
        with stop_on_signals():
            self._thread.start()
            deadline = math.inf
            while not self._connected.done() and time.monotonic() < deadline:
                wait((self._connected,), timeout=POLL_SECONDS)
                if stop_requested():
                    deadline = min(deadline, time.monotonic() + INTERRUPTED_START_SECONDS)
            if stop_requested():
                raise KeyboardInterrupt
        return self._connected.result()

    def stop(self, *, is_interrupted: bool) -> None:
        """Shut Ray down and clean up, within a time limit: a short one after an interruption."""
        self._is_over.set()
        if self._connected.done():
            seconds = INTERRUPTED_SHUTDOWN_SECONDS if is_interrupted else SHUTDOWN_SECONDS
            self._thread.join(seconds)
        if is_interrupted and self._thread.is_alive():
            # A native thread that is still busy would crash the interpreter at exit.
            atexit.register(self._exit_now)
        else:
            self._clean_up()

    def _exit_now(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._clean_up()
        os._exit(EXIT_CODE_INTERRUPTED)


class LocalRay:
    """A Ray of this machine: its thread, its processes and its temporary folder."""

    def __init__(self, cluster: ClusterSettings, num_cpus: int | None) -> None:
        """Make the folder; Ray is not started yet."""
        self._scratch = make_scratch_folder(longest_path=LONGEST_TEMPORARY_FOLDER)
        self.folder = self._scratch.folder
        self._thread = RayThread(partial(_start_local, cluster, num_cpus), self.kill)
        self._daemons: list[psutil.Process] = []
        """Ray's processes that this process has started."""
        self._processes: list[psutil.Process] = []
        """Ray's processes at the beginning of the shutdown: the daemons and their workers."""

    def start(self) -> Resources:
        """Start Ray, and return what jobs may use.

        Raises:
            RunFailed: If Ray does not start.
            KeyboardInterrupt: After Ctrl-C or SIGTERM; daemons may run.
        """
        earlier_children = psutil.Process().children()
        try:
            return self._thread.start()
        finally:
            children = psutil.Process().children()
            self._daemons = [child for child in children if child not in earlier_children]

    def stop(self, *, is_interrupted: bool) -> None:
        """Shut Ray down; after a time limit, which is short after an interruption, kill it."""
        # Workers can be found only while the daemon that started them lives.
        for daemon in self._daemons:
            with suppress(psutil.NoSuchProcess):
                self._processes += [daemon, *daemon.children(recursive=True)]
        self._thread.stop(is_interrupted=is_interrupted)

    def kill(self) -> None:
        """End the processes that are left, and delete the folder."""
        _, left = psutil.wait_procs(self._processes, timeout=0.5)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._scratch.delete()


_running: Resources | None = None
"""Resources of the running Ray."""


@contextmanager
def ray_cluster(
    cluster: ClusterSettings | None = None,
    *,
    folder: Path | None = None,
    num_cpus: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[Resources]:
    """Start or join Ray until the block ends, or use a running one; yields its resources.

    Args:
        cluster: Names the cluster to join; the default settings when unset.
        folder: A folder that all nodes must see, such as the workspace.
        num_cpus: CPUs of a local Ray; all that this process may use when unset.
        say: Called with a sentence before Ray starts, which takes seconds.

    Raises:
        UserError: If Ray cannot start here, the cluster cannot be joined, or one of its nodes
            cannot be used.
        RunFailed: If Ray does not start.
    """
    global _running
    if _running is not None:
        yield replace(_running, nodes=alive_nodes())  # Nodes may have joined or left.
        return
    cluster = cluster or ClusterSettings()
    address = cluster.ray_address
    is_local = address == LOCAL
    if say:
        say("starting Ray" if is_local else f"joining the Ray cluster at {address}")
    check_ray_can_run(address)
    connection: LocalRay | RayThread
    if is_local:
        connection = LocalRay(cluster, num_cpus)
        environment = ray_environment(address, connection.folder)
    else:
        connection = RayThread(partial(_join_cluster, cluster, folder))
        environment = ray_environment(address)
    is_interrupted = False
    with environment:
        try:
            with signal_handlers((signal.SIGTERM, signal.SIGHUP), signal.default_int_handler):
                _running = connection.start()
                yield _running
        except (KeyboardInterrupt, Interrupted):
            is_interrupted = True
            raise
        finally:
            _running = None
            with signal_handlers(SIGNALS, signal.SIG_IGN):
                connection.stop(is_interrupted=is_interrupted)


def _start_local(cluster: ClusterSettings, num_cpus: int | None) -> Resources:
    import ray

    _send_messages_to_log()
    resources = local_resources()
    try:
        ray.init(
            LOCAL,
            num_cpus=num_cpus or resources.cpus,
            num_gpus=resources.gpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **_driver_options(cluster),
        )
    except Exception as error:
        raise RunFailed(f"Ray did not start: {error}") from error
    return Resources(alive_nodes(), THIS_MACHINE)


def _join_cluster(cluster: ClusterSettings, folder: Path | None) -> Resources:
    """Join the cluster that the settings name, and check its nodes."""
    import ray

    _send_messages_to_log()
    address = cluster.ray_address
    try:
        ray.init(address, **_driver_options(cluster))
    except Exception as error:
        if re.search("Unauthenticated|AuthenticationError", "".join(format_exception(error))):
            raise UserError(
                f"the cluster at {address} asks for another token; set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN to the token that the cluster was started with"
            ) from error
        # Ray's reason, such as different versions, may have several lines.
        reason = " ".join(str(error).split())
        raise UserError(
            f"the cluster at {address} cannot be joined ({reason}); {_ADVICE}"
        ) from error
    check_nodes(folder)
    return Resources(alive_nodes(), f"the cluster at {address}")


def _driver_options(cluster: ClusterSettings) -> dict[str, Any]:
    """Return the options of `ray.init` for both a local and a joined Ray."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if variables := worker_variables(cluster.env, cluster.ray_address):
        options["runtime_env"] = {"env_vars": variables}
    return options


def _send_messages_to_log() -> None:
    """Send messages of Ray's daemons, such as the death of a worker, to the log.

    Ray prints them to standard output, where a command prints its JSON, and has no setting for it.
    This is the only use of a private part of Ray; a version without it prints the messages.
    """
    import ray

    worker: Any = getattr(ray, "_private", None) and ray._private.worker
    # Ray would warn that it cannot handle SIGTERM in this thread; this program handles it.
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)
    if hasattr(worker, "print_to_stdstream"):

        def log(data: dict[str, Any], *_: Any, **__: Any) -> None:
            lines = "\n".join(data.get("lines", []))
            logging.getLogger("ray").warning("(%s) %s", data.get("pid"), lines)

        worker.print_to_stdstream = log


# Quick checks: Ray itself tries an address for 40 seconds or longer

_ADVICE = (
    f"start it (`ray start --head`), correct cluster.address or {ADDRESS_VARIABLE}, or set "
    f"cluster.address={LOCAL} to use this machine"
)


def check_ray_can_run(address: str) -> None:
    """Check quickly whether Ray can run, before anything is prepared for it.

    A cluster's head node must answer, and this machine must be one of its nodes.

    Raises:
        UserError: Says what is wrong.
    """
    if address == LOCAL:
        return
    host, _, port = address.rpartition(":")
    try:
        if host:  # With `auto`, Ray looks for a cluster on this machine.
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"no Ray cluster answers at {address} ({reason}); {_ADVICE}") from None
    # A command talks to the cluster through its own machine's node, which Ray would look for for
    # a minute.
    if any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"])):
        return
    if address == AUTO:
        raise UserError(f"no Ray cluster runs on this machine; {_ADVICE}")
    raise UserError(
        f"this machine is not a node of the cluster at {address}; run the command on one of its "
        f"nodes, or `ray start --address {address}` here first"
    )
