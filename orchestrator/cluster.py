"""Ray started so that it stays on this machine, stays quiet and leaves nothing behind.

`ray_cluster` starts Ray for a block of code, or joins the cluster that `RAY_ADDRESS` names. A local
one listens on loopback only, with a token of its own, in a short temporary folder (a socket's path
has little room). At the end, whatever ends it, every process that came with it is gone.
`run_interruptibly` runs a Ray job in a thread while the main thread watches it: neither Ray Train
nor Ray Tune lets a training loop save its state on Ctrl-C, so the request goes through a stop flag,
with bounded patience. Only this module and `worker.py` import ray.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from orchestrator.errors import Interrupted, StageFailed
from orchestrator.resources import Resources, local_resources

# Ray reads these when it is imported; what the user has set stays.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would upload the whole working directory
    "RAY_AUTH_MODE": "token",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a worker's end is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 Tune prints nothing
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
# On Linux too, this is what keeps every socket on loopback.
_LOCAL_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

OBJECT_STORE_BYTES = 128 * 2**20  # data does not travel through Ray; its own minimum is 75 MB
LONGEST_TEMPORARY_FOLDER = 40  # characters; a socket's path adds up to 64 of at most 107
GRACE_SECONDS = 4.5
SHUTDOWN_SECONDS = 3.0
POLL_SECONDS = 0.2

T = TypeVar("T")


def _prepare_environment() -> None:
    is_local = not os.environ.get("RAY_ADDRESS")
    for name, value in (_ENVIRONMENT | (_LOCAL_ENVIRONMENT if is_local else {})).items():
        os.environ.setdefault(name, value)
    if is_local and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        # One token for this process and its children; Ray would write one into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


_prepare_environment()

import ray  # noqa: E402


@dataclass(frozen=True)
class Cluster:
    """A running Ray."""

    resources: Resources
    """What its jobs may use."""
    scratch: Path
    """Ray's own files; deleted at the end."""


_running: Cluster | None = None


@contextmanager
def ray_cluster(*, num_cpus: int | None = None) -> Iterator[Cluster]:
    """Start Ray until the block ends, or use the one that runs already.

    Args:
        num_cpus: CPUs of a local cluster; all that this process may use when unset.

    Raises:
        StageFailed: If Ray does not start, or does not answer at `RAY_ADDRESS`.
    """
    global _running
    if _running is not None:
        yield _running
        return
    scratch = _short_folder()
    before = {process.pid for process in psutil.Process().children()}
    with _handling((signal.SIGTERM,), _interrupt):
        try:
            _running = Cluster(_start(scratch, num_cpus), scratch)
            if (
                _in_main_thread()
            ):  # Ray has put a handler of its own there, which exits on the spot.
                signal.signal(signal.SIGTERM, _interrupt)
            yield _running
        finally:
            _running = None
            with _handling((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN):
                _stop(before)
                shutil.rmtree(scratch, ignore_errors=True)


def run_interruptibly(
    work: Callable[[], T],
    *,
    ask_to_stop: Callable[[], None],
    watch: Callable[[], None] | None = None,
    grace_seconds: float = GRACE_SECONDS,
) -> T:
    """Run a Ray job in a thread, so that Ctrl-C and SIGTERM reach it as a request to save and stop.

    Args:
        work: The job; it returns soon after it was asked to stop.
        ask_to_stop: Called once, at the first signal.
        watch: Called a few times a second in the calling thread, to show progress.
        grace_seconds: How long the job may take to stop; a second signal ends the wait.

    Returns:
        What the job returns.

    Raises:
        Interrupted: After a signal. What still runs ends with the cluster.
    """
    future: Future[T] = Future()
    signals: list[int] = []
    with _handling((signal.SIGINT, signal.SIGTERM), lambda number, _: signals.append(number)):
        threading.Thread(target=_fulfil, args=(future, work), daemon=True).start()
        give_up_at = float("inf")
        while not future.done() and len(signals) < 2 and time.monotonic() < give_up_at:
            if signals and give_up_at == float("inf"):
                ask_to_stop()
                give_up_at = time.monotonic() + grace_seconds
            wait((future,), timeout=POLL_SECONDS)
            if watch:
                watch()
    if signals:
        saved = "the state is saved" if future.done() else "the last checkpoint is saved"
        raise Interrupted(f"interrupted; {saved}, and the same command goes on from there")
    return future.result()


def _fulfil(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


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
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **options)
    except Exception as error:
        raise StageFailed(f"Ray did not start ({address}): {error}") from error
    if address != "local":
        found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cpus, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
        resources = Resources(cpus, gpus, f"the cluster at {address}")
    return resources


def _stop(before: set[int]) -> None:
    """End Ray, by force where it does not end by itself; earlier children are not ours."""
    family: list[psutil.Process] = []
    for child in psutil.Process().children():
        if child.pid not in before and _is_ray(child):
            family += [child, *_children(child)]
    stopping = threading.Thread(target=ray.shutdown, daemon=True)
    stopping.start()
    stopping.join(SHUTDOWN_SECONDS)
    _, alive = psutil.wait_procs(family, timeout=0.5)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=0.5)


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


def _short_folder() -> Path:
    """Make Ray's temporary folder, and remove those of processes that were killed."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > LONGEST_TEMPORARY_FOLDER - 24:
        parent = Path("/tmp")
    for folder in parent.glob("iiet-*-*"):
        number = folder.name.split("-")[1]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"iiet-{os.getpid()}-", dir=parent))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def _handling(numbers: Iterable[signal.Signals], handler: Any) -> Iterator[None]:
    # Only the main thread may set handlers; elsewhere signals are somebody else's business.
    if not _in_main_thread():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, function in earlier.items():
            signal.signal(number, function)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
