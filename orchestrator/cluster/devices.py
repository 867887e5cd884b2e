"""The device of a Ray worker, and pretended GPUs.

A machine without GPUs can rehearse how jobs are placed on a cluster of GPUs: start Ray with
`--num-gpus 8`, and set `IIET_PRETENDED_GPUS=1` for Ray and for the command. Workers that reserved a
GPU then compute on the CPU.
"""

from __future__ import annotations

import os

import torch

from orchestrator.cluster.environment import PRETENDED_GPUS
from orchestrator.workspace.errors import DeviceError


def are_gpus_pretended() -> bool:
    """Return whether Ray's GPUs are only names, and work that reserves one runs on CPUs."""
    return os.environ.get(PRETENDED_GPUS) == "1"


def worker_device(*, use_gpu: bool) -> str:
    """Return the device of this process, which is a Ray task or actor: `cuda` or `cpu`.

    Args:
        use_gpu: Whether it has reserved a GPU.

    Raises:
        DeviceError: If PyTorch cannot use the GPU that Ray reserved.
    """
    if not use_gpu or are_gpus_pretended():
        return "cpu"
    if not torch.cuda.is_available():
        raise DeviceError(
            f"Ray reserved a GPU on {os.uname().nodename}, but PyTorch {torch.__version__} cannot "
            "use it; install a CUDA build of PyTorch and a driver that it supports on each node"
        )
    return "cuda"


def collective_backend(*, use_gpu: bool) -> str:
    """Return PyTorch's backend for the communication of several workers."""
    return "nccl" if use_gpu and not are_gpus_pretended() else "gloo"
