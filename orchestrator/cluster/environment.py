"""Environment variables that Ray and PyTorch read; the package's `__init__` sets them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would upload the whole working directory
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a worker's end is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 Tune prints nothing
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files that nobody reads, left open after a stop
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
# Of a cluster that is started here; one elsewhere says itself whether it asks for a token.
_LOCAL_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too, this keeps every socket on loopback
    "RAY_prestart_worker_first_driver": "0",  # idle workers that no trial and no job would use
    "RAY_enable_worker_prestart": "0",
}
TOKEN_NAMES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Variables that hold Ray's token, or the path of its file."""
_set_here: dict[str, str] = {}
"""What `prepare_environment` set for a cluster that is started here."""
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Names of the options of PyTorch's allocator; all versions read the first, newer ones both."""


def prepare_environment() -> None:
    """Set what the user has not set."""
    # On GPUs, the allocator then loses less memory to gaps between its blocks. Each worker imports
    # this package before it uses a GPU.
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        return
    local = dict(_LOCAL_ENVIRONMENT)
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        # One token for this process and its children; Ray would write one into the home folder.
        local["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _set_here.update({name: value for name, value in local.items() if name not in os.environ})
    os.environ.update(_set_here)


def prepare_for_server() -> None:
    """Prepare for requests to a cluster elsewhere; before Ray is imported.

    Like `ray start`, use a token if there is one.
    """
    for name in _set_here:
        os.environ.pop(name, None)
    _set_here.clear()
    if any(map(os.environ.get, TOKEN_NAMES)) or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
