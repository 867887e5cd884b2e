"""The only imports of Ray: start or join it, find slots for workers, run Ray Train and Ray Tune.

`task.py` chooses between Ray and this process. Ray reads its environment when it is imported, and
importing it takes two seconds. So all modules but `tune.py` import it within functions.
"""

import os

PRETENDED_GPUS = "IIET_PRETENDED_GPUS"
"""Variable that lets work that reserved a GPU run on the CPU; see `placement.py`."""
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Names of the options of PyTorch's allocator; all versions read the first, newer ones both."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would upload the whole working directory
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Variables of a Ray job and those of `cluster.env` may be the same; they have the same values.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a worker's end is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # for slots that were free a moment before
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Ray asks NCCL which collective operation does not move, and then ends the workers.
    "RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR": "1",
    "RAY_TRAIN_NCCL_RAS_ACTION": "fail",
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 Tune prints nothing
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files that nobody reads, left open after a stop
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def prepare_environment() -> None:
    """Set what Ray and PyTorch read when they are imported, unless the user has set it."""
    # On GPUs, the allocator then loses less memory to gaps between its blocks. Each worker imports
    # this package before it uses a GPU.
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


prepare_environment()
