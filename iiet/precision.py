"""Keeps values and parameters in float32 while a model computes in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

__all__ = ["HALF", "KeepsFloat32", "at_least_float32", "product_dtype"]

HALF = (torch.bfloat16, torch.float16)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a float32 or float64 tensor as it is, and any other as float32."""
    # `torch.promote_types` says the same and costs a decoding step as much as a kernel.
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a product of the tensor is computed."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


class KeepsFloat32(nn.Module):
    """A module whose own parameters stay float32 when the model is moved to half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype not in HALF or tensor.dtype in HALF:
                return result
            return tensor.to(result.device, torch.float32)

        module: Self = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return module
