"""How a model computes: in which precision, and by plain formulas or by faster ones.

Faster formulas are written by hand and compute the same. (The two forms of attention are PyTorch's
own.) The plain form runs under `torch.compile` (which fuses attention itself), in the transforms of
`torch.func`, in forward-mode differentiation, and within `plain_formulas()`, which second
derivatives need. In half precision, some values and parameters stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = [
    "HALF",
    "KeepsFloat32",
    "at_least_float32",
    "fast_forms_allowed",
    "needs_all_derivatives",
    "plain_formulas",
    "product_dtype",
]

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


_plain_contexts = 0


@contextmanager
def plain_formulas() -> Iterator[None]:
    """Run plain formulas only.

    Fast ones are differentiable once, so a gradient of a gradient needs this context around both
    passes:

        with plain_formulas():
            (slope,) = torch.autograd.grad(loss(decoder), weights, create_graph=True)
    """
    global _plain_contexts
    _plain_contexts += 1
    try:
        yield
    finally:
        _plain_contexts -= 1


def fast_forms_allowed() -> bool:
    """Return whether formulas that are differentiable once may be used now."""
    return not torch.compiler.is_compiling() and not needs_all_derivatives()


def needs_all_derivatives() -> bool:
    """Return whether other derivatives than a first backward pass may be needed."""
    return not torch.compiler.is_compiling() and (
        _plain_contexts > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
