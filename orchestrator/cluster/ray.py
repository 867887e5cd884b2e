"""Start Ray on this machine for a block of code, or join the cluster that the settings name.

A local Ray listens on loopback only, with a token of its own, in a short temporary folder (a
socket's path is limited to 107 characters). At the end, all of its processes are gone. The nodes of
a joined cluster are checked before they get work. A `Signal` asks processes on any node to stop.
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
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from orchestrator.cluster import PRETENDED_GPUS
from orchestrator.cluster.nodes import alive_nodes, check_nodes, check_shared_memory, shared_memory
from orchestrator.planning.machine import Resources, describe_nodes, local_resources
from orchestrator.settings import ClusterSettings
from orchestrator.settings.cluster import ADDRESS_VARIABLE, AUTO, LOCAL
from orchestrator.terminal.stop import (
    POLL_SECONDS,
    SIGNALS,
    signal_handlers,
    stop_on_signals,
    stop_requested,
    wait_interruptibly,
)
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError, first_line
from orchestrator.workspace.files import ScratchFolder, make_scratch_folder

LONGEST_TEMPORARY_FOLDER = 38  # characters; Ray's folder and a socket add up to 68, of 107 at most
OBJECT_STORE_BYTES = 128 * 2**20
"""Object store of a Ray that a command starts: data does not travel through it; its own minimum is
75 MB."""
CONNECT_SECONDS = 5.0
# After Ctrl-C everything together must take less than ten seconds.
INTERRUPTED_START_SECONDS = 2.0
INTERRUPTED_SHUTDOWN_SECONDS = 3.0
SHUTDOWN_SECONDS = 60.0  # after a normal end
EXIT_CODE_INTERRUPTED = 130
PLACEMENT_SECONDS = 2.0
"""Ray finds a place on nodes that are free within this time."""

# Environment of Ray and its processes.

LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
WATCHER_SWITCH = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Variable for Ray Train's process that hears of nodes that will be taken away."""
_LOCAL_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    # One token for this process and its children; Ray would write one into the home folder.
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    LOOPBACK_SWITCH: "0",  # on Linux too, this keeps every socket on loopback
    "RAY_prestart_worker_first_driver": "0",  # idle workers that no trial and no job would use
    "RAY_enable_worker_prestart": "0",
    # Its only node cannot be lost alone: a busy or sleeping machine must not end a run.
    "RAY_health_check_failure_threshold": "60",
    WATCHER_SWITCH: "0",
}
_JOINING_ENVIRONMENT = {
    "RAY_gcs_server_port_wait_time_s": "8",  # tries to reach the head node, about one a second
}
_imported_for_local: bool | None = None
"""Whether Ray was imported in the environment of a local one; None: it was not imported."""


def address_variables(address: str) -> dict[str, str | None]:
    """Return the variables of a Ray that is started here or joined; None: not set.

    What the user has set stays, except `RAY_ADDRESS`: parts of Ray read it themselves, so it
    follows the address.
    """
    defaults = _LOCAL_ENVIRONMENT if address == LOCAL else _JOINING_ENVIRONMENT
    variables: dict[str, str | None] = {
        name: os.environ.get(name) or value
        for name, value in defaults.items()
        if name != "RAY_AUTH_TOKEN" or not os.environ.get("RAY_AUTH_TOKEN_PATH")
    }
    return variables | {ADDRESS_VARIABLE: None if address in (LOCAL, AUTO) else address}


@contextmanager
def ray_environment(address: str) -> Iterator[None]:
    """Set the variables of a local or a joined Ray in a block, in which Ray is imported.

    Raises:
        UserError: If Ray was imported before, in the environment of the other kind.
    """
    global _imported_for_local
    if _imported_for_local is None and "ray" in sys.modules:
        _imported_for_local = os.environ.get(LOOPBACK_SWITCH) == "0"
    if _imported_for_local not in (None, address == LOCAL):
        raise UserError(
            "this process has imported Ray "
            + (
                "before iiet-orch could keep it on loopback; import orchestrator and start the run "
                f"first, or set {LOOPBACK_SWITCH}=0 before Ray is imported"
                if address == LOCAL
                else "for this machine alone; join a cluster from another process"
            )
        )
    variables = address_variables(address)
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        if "ray" in sys.modules:
            _imported_for_local = address == LOCAL
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def worker_variables(entries: Iterable[str], address: str) -> dict[str, str]:
    """Return the environment variables that Ray sets for its workers.

    Those of a local Ray inherit what is set here.

    Args:
        entries: As in the setting `cluster.env`.
    """
    found = {}
    for entry in (PRETENDED_GPUS, *entries):
        name, is_set, value = entry.partition("=")
        if is_set:
            found[name] = value
        elif address != LOCAL:
            found |= {known: os.environ[known] for known in fnmatch.filter(os.environ, name)}
    return found


# Start and end.

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
    global _running
    if _running is not None:
        yield replace(_running, nodes=alive_nodes())  # Nodes may have joined or left.
        return
    cluster = cluster or ClusterSettings()
    address = cluster.ray_address
    if say:
        say("starting Ray" if address == LOCAL else f"joining the Ray cluster at {address}")
    check_ray_can_run(address)
    with ray_environment(address):
        variables = worker_variables(cluster.env, address)
        options: dict[str, Any] = {
            "runtime_env": {"env_vars": variables} if variables else None,
            "log_to_driver": False,
            "logging_level": logging.WARNING,
        }
        scratch = make_scratch_folder(longest_path=LONGEST_TEMPORARY_FOLDER)
        if address == LOCAL:
            start = partial(_start_here, scratch.folder, num_cpus, options)
        else:
            start = partial(_join, address, folder, options)
        with _ray_in_thread(start, scratch) as _running:
            try:
                yield _running
            finally:
                _running = None


@contextmanager
def _ray_in_thread(start: Callable[[], Resources], scratch: ScratchFolder) -> Iterator[Resources]:
    """Start Ray in a thread, which shuts it down after the block.

    The kernel ends Ray's processes with the thread that started them, so the thread stays. The main
    thread handles signals: one that interrupted `ray.init` would later crash the interpreter.
    """
    earlier = {process.pid for process in psutil.Process().children()}
    started: Future[Resources] = Future()
    is_over = threading.Event()

    def run() -> None:
        # Ray's processes inherit this. A closed terminal must not end them before they have saved.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            started.set_result(start())
        except BaseException as error:
            started.set_exception(error)
        is_over.wait()
        import ray

        ray.shutdown()

    thread = threading.Thread(target=run, daemon=True)
    seconds = SHUTDOWN_SECONDS
    try:
        with signal_handlers((signal.SIGTERM, signal.SIGHUP), signal.default_int_handler):
            with stop_on_signals():
                thread.start()
                deadline = math.inf
                while not started.done() and time.monotonic() < deadline:
                    wait((started,), timeout=POLL_SECONDS)
                    if stop_requested():
                        deadline = min(deadline, time.monotonic() + INTERRUPTED_START_SECONDS)
                if stop_requested():
                    raise KeyboardInterrupt
            yield started.result()
    except (KeyboardInterrupt, Interrupted):
        seconds = INTERRUPTED_SHUTDOWN_SECONDS
        raise
    finally:
        with signal_handlers(SIGNALS, signal.SIG_IGN):
            processes = _ray_processes(earlier)
            is_over.set()
            if started.done():
                thread.join(seconds)
            if thread.is_alive() and seconds < SHUTDOWN_SECONDS:
                # A native thread that is still busy would crash the interpreter's own end.
                atexit.register(_kill_and_exit, processes, scratch)
            else:
                _kill(psutil.wait_procs(processes, timeout=0.5)[1])
                scratch.delete()


def _start_here(scratch: Path, num_cpus: int | None, options: dict[str, Any]) -> Resources:
    import ray

    resources = local_resources()
    _send_messages_to_log()
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = str(scratch)  # Ray opens its folder to every user: one inside ours.
    try:
        ray.init(
            LOCAL,
            num_cpus=num_cpus or resources.cpus,
            num_gpus=resources.gpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **options,
        )
    except Exception as error:
        raise RunFailed(f"Ray did not start: {error}") from error
    finally:
        _set({"RAY_TMPDIR": before})
    return Resources(alive_nodes())


def _join(address: str, folder: Path | None, options: dict[str, Any]) -> Resources:
    import ray

    _send_messages_to_log()
    try:
        ray.init(address, **options)
    except Exception as error:
        raise UserError(joining_problem(error, address)) from error
    check_nodes(folder)
    return Resources(alive_nodes(), f"the cluster at {address}")


def _send_messages_to_log() -> None:
    """Send messages of Ray's daemons, such as that a worker died, to the log.

    Ray has no setting for this, and prints them where a command prints its JSON. This is the only
    part of Ray that is used here and not public; a version without it prints them.
    """
    import ray

    worker: Any = getattr(ray, "_private", None) and ray._private.worker
    # It would say that SIGTERM has no handler of Ray's in this thread; there is one of ours.
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)
    if hasattr(worker, "print_to_stdstream"):

        def log(data: dict[str, Any], *_: Any, **__: Any) -> None:
            lines = "\n".join(data.get("lines", []))
            logging.getLogger("ray").warning("(%s) %s", data.get("pid"), lines)

        worker.print_to_stdstream = log


def _ray_processes(earlier: set[int]) -> list[psutil.Process]:
    # Without other children of this process, and those from before the start.
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            words = child.cmdline()
            is_ray = any("/ray/" in word or word.startswith("ray::") for word in words)
            if child.pid not in earlier and is_ray:
                found += [child, *child.children(recursive=True)]
    return found


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


# What can be known in seconds about an address: Ray itself tries for 40 seconds or longer.

_ADVICE = (
    f"start it (`ray start --head`), correct cluster.address or {ADDRESS_VARIABLE}, or set "
    f"cluster.address={LOCAL} to use this machine"
)
_VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")


def check_ray_can_run(address: str) -> None:
    """Check what can be known in seconds, before anything is prepared for Ray.

    Here it needs shared memory. A cluster's head node must answer, and one of its nodes must be
    this machine.

    Raises:
        UserError: Says what is wrong.
    """
    if address == LOCAL:
        check_shared_memory(OBJECT_STORE_BYTES, shared_memory().free)
        return
    host, _, port = address.rpartition(":")
    try:
        if host:  # With `auto`, Ray looks for a cluster on this machine.
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"no Ray cluster answers at {address} ({reason}); {_ADVICE}") from None
    # A command talks to the cluster through the node of its own machine. Ray looks for it for a
    # minute.
    if not any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"])):
        raise UserError(_not_a_node(address))


def joining_problem(error: BaseException, address: str) -> str:
    """Say in one sentence why Ray could not join a cluster.

    Args:
        error: What `ray.init` raised.
    """
    texts = []
    cause: BaseException | None = error
    while cause:
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    text = "\n".join(texts)
    versions = _VERSIONS.findall(text)
    if "Version mismatch" in text and len(versions) > 1:
        (theirs, python), (ours, own_python) = versions[:2]
        return (
            f"the cluster at {address} runs Ray {theirs} and Python {python}, and this command "
            f"Ray {ours} and Python {own_python}; install the same versions on all nodes"
        )
    if "Unauthenticated" in text or "AuthenticationError" in text:
        return (
            f"the cluster at {address} asks for another token; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN to the token that the cluster was started with"
        )
    if "No node info found" in text:
        return _not_a_node(address)
    if "Could not find any running Ray instance" in text:
        return _not_a_node(AUTO)
    return f"the Ray cluster at {address} cannot be joined ({first_line(error)}); {_ADVICE}"


def _not_a_node(address: str) -> str:
    if address == AUTO:
        return f"no Ray cluster runs on this machine; {_ADVICE}"
    return (
        f"this machine is not a node of the cluster at {address}; run the command on one of its "
        f"nodes, or `ray start --address {address}` here first"
    )


# Places and signals.


@contextmanager
def asked_places(bundles: Sequence[dict[str, float]], strategy: str = "PACK") -> Iterator[Any]:
    """Ask Ray for places in a block; yield the placement group, whose `wait(seconds)` finds them.

    Ray's autoscaler starts nodes for them.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([*bundles], strategy)
    try:
        yield group
    finally:
        remove_placement_group(group)


def wait_for_gpus(num_gpus: float, note: Callable[[str], None] | None = None) -> None:
    """Wait until a job's GPUs are free, each with a CPU.

    Args:
        num_gpus: GPUs of the job, or a share of one; 0 returns at once.
        note: Called with a sentence if there is something to wait for.

    Raises:
        Interrupted: After Ctrl-C or SIGTERM.
    """
    if not num_gpus:
        return
    num_workers = math.ceil(num_gpus)
    with asked_places([{"CPU": 1, "GPU": num_gpus / num_workers}] * num_workers) as group:
        if not group.wait(PLACEMENT_SECONDS):
            nodes = describe_nodes(alive_nodes())
            text = f"waiting for {num_gpus:g} free GPUs; the cluster has {nodes}"
            wait_interruptibly(partial(group.wait, 0), begin=partial(note, text) if note else None)


NAMESPACE = "iiet-orch"
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Signal:
    """Something that is sent once to the processes of a driver on any node.

    It is sent when Ray has an actor of its name, which ends with the driver that sent it. Looking
    for it asks Ray's head, and takes less than a millisecond.
    """

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Name of the actor; unique, so that only copies of one object share a signal."""

    def part(self, name: str) -> Signal:
        """Return the signal of a part, such as one of several trials."""
        return Signal(f"{self.key}/{name}")

    def send(self) -> None:
        """Send it, if it was not sent before."""
        import ray

        actor: Any = ray.remote(num_cpus=0)(_Sent)
        name = {"name": self.key, "namespace": NAMESPACE, "get_if_exists": True}
        _sent.append(actor.options(**name).remote())

    def is_sent(self) -> bool:
        """Return whether it was sent."""
        import ray

        try:
            ray.get_actor(self.key, namespace=NAMESPACE)
        except ValueError:
            return False
        return True


class _Sent:
    """The actor of a signal that was sent: it does nothing."""


_sent: list[Any] = []
"""An actor lives as long as somebody holds it."""


def looks_for(sent: Signal) -> Callable[[], bool]:
    """Return a function that says whether a signal was sent, and asks Ray twice a second."""
    import ray.exceptions

    is_sent, next_look = False, -math.inf

    def look() -> bool:
        nonlocal is_sent, next_look
        if not is_sent and time.monotonic() >= next_look:
            with suppress(ray.exceptions.RayError):  # Ray's head is busy, or gone and ends us.
                is_sent = sent.is_sent()
            next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        return is_sent

    return look
