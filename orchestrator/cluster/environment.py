"""Environment variables that Ray and PyTorch read; the package's `__init__` sets them."""

from __future__ import annotations

import os
import secrets

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


ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Names of the options of PyTorch's allocator; all versions read the first, newer ones both."""


def prepare_environment() -> None:
    """Set what the user has not set."""
    # On GPUs, the allocator then loses less memory to gaps between its blocks. Each worker imports
    # this package before it uses a GPU.
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    is_local = not os.environ.get("RAY_ADDRESS")
    for name, value in (_ENVIRONMENT | (_LOCAL_ENVIRONMENT if is_local else {})).items():
        os.environ.setdefault(name, value)
    if is_local and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        # One token for this process and its children; Ray would write one into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
