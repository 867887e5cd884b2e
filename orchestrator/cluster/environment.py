"""Environment variables that Ray and PyTorch read.

The package's `__init__` sets those that they read when they are imported. Those that depend on the
address of the cluster hold while Ray runs.
"""

from __future__ import annotations

import fnmatch
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.settings.cluster import ADDRESS_VARIABLE, AUTO, LOCAL

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would upload the whole working directory
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Variables of a Ray job and those of `cluster.env` may be the same; they have the same values.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a worker's end is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # how soon a wait for places is announced
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # `preemption.py` serves trials, too
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "10",  # a group with a dead worker may never end
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 Tune prints nothing
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files that nobody reads, left open after a stop
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
PRETENDED_GPUS = "IIET_PRETENDED_GPUS"
"""Variable that lets work on GPUs run on CPUs; see `devices`."""
LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Of a Ray that is started here; a cluster says itself whether it asks for a token.
_LOCAL_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    # One token for this process and its children; Ray would write one into the home folder.
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    LOOPBACK_SWITCH: "0",  # on Linux too, this keeps every socket on loopback
    "RAY_prestart_worker_first_driver": "0",  # idle workers that no trial and no job would use
    "RAY_enable_worker_prestart": "0",
    # Its only node cannot be lost alone: a busy or sleeping machine must not end a run.
    "RAY_health_check_failure_threshold": "60",
}
_JOINING_ENVIRONMENT = {
    "RAY_gcs_server_port_wait_time_s": "8",  # tries to reach the head node, about one a second
}
TOKEN_NAMES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Variables that hold Ray's token, or the path of its file."""
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Names of the options of PyTorch's allocator; all versions read the first, newer ones both."""


def prepare_environment() -> None:
    """Set what the user has not set, before Ray is imported."""
    # On GPUs, the allocator then loses less memory to gaps between its blocks. Each worker imports
    # this package before it uses a GPU.
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def prepare_for_server() -> None:
    """Use a token for requests to a cluster elsewhere if there is one, like `ray start`."""
    if any(map(os.environ.get, TOKEN_NAMES)) or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


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


def address_variables(address: str, environment: Mapping[str, str]) -> dict[str, str | None]:
    """Return the variables of a Ray that is started here or joined; None: not set.

    What the user has set in `environment` stays, except `RAY_ADDRESS`: parts of Ray read it
    themselves, so it follows the address.
    """
    defaults = _LOCAL_ENVIRONMENT if address == LOCAL else _JOINING_ENVIRONMENT
    variables: dict[str, str | None] = {
        name: environment.get(name) or value
        for name, value in defaults.items()
        if name != "RAY_AUTH_TOKEN" or not environment.get("RAY_AUTH_TOKEN_PATH")
    }
    return variables | {ADDRESS_VARIABLE: None if address in (LOCAL, AUTO) else address}


@contextmanager
def ray_environment(address: str) -> Iterator[None]:
    """Set the `address_variables` in the block. No Ray may run in this process before it."""
    variables = address_variables(address, os.environ)
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    _refresh_ray(is_local=address == LOCAL)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _refresh_ray(*, is_local: bool) -> None:
    """Let Ray read again what it read when it was imported; it has no public call for this."""
    import ray
    from ray._private import ray_constants

    raylet: Any = ray._raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    constants: Any = ray_constants
    constants.ENABLE_RAY_CLUSTER = not is_local or os.environ.get(LOOPBACK_SWITCH) == "1"
