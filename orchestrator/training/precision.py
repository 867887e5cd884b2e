"""What a device can compute in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import torch

from orchestrator.settings.training import Precision, default_precision
from orchestrator.workspace.errors import DeviceError

Capability = Callable[[torch.device], tuple[int, int]]
"""Returns the compute capability of a GPU."""

FIRST_WITH_BF16 = (8, 0)
"""Compute capability from which GPUs have bfloat16; PyTorch emulates it slowly on older ones."""


def device_precision(
    device: str | torch.device, capability: Capability = torch.cuda.get_device_capability
) -> Precision:
    """Return the precision that a model on this device is evaluated in if none is set."""
    device = torch.device(device)
    is_gpu = device.type == "cuda"
    return default_precision(on_gpus=is_gpu and capability(device) >= FIRST_WITH_BF16)


def check_precision(
    precision: str,
    device: str | torch.device,
    *,
    section: str,
    capability: Capability = torch.cuda.get_device_capability,
) -> None:
    """Check that a training's device has its precision.

    A silent change to float32 would give another model than the plan and its key say.

    Args:
        section: Section of the settings that holds the recipe, for the message.

    Raises:
        DeviceError: If bf16 is set and the GPU would emulate it.
    """
    device = torch.device(device)
    if precision != "bf16" or device.type != "cuda":
        return
    found = capability(device)
    if found < FIRST_WITH_BF16:
        raise DeviceError(
            f"{section}.precision is bf16, and {device} has compute capability "
            f"{found[0]}.{found[1]}, which has no bfloat16; type --set {section}.precision=fp32 "
            "--set evaluation.precision=fp32"
        )


def frozen_dtype(precision: str, device: str | torch.device) -> torch.dtype:
    """Return the dtype of a teacher's weights: a GPU needs no float32 ones for bf16."""
    is_half = precision == "bf16" and torch.device(device).type == "cuda"
    return torch.bfloat16 if is_half else torch.float32
