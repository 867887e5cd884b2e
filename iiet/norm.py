"""RMSNorm with a backward pass written out: `x * rstd(x) * weight`, with `rstd = 1 / sqrt(mean(x^2)
+ eps)`.

The CPU has no fused kernel for it, and composed from operations it costs a dozen passes over the
hidden state and keeps several intermediate tensors. Here six passes suffice, and only the input and
one number per token are kept.

Source: Zhang and Sennrich 2019; derivative by this project.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["RMSNorm", "normalize"]


class RMSNorm(nn.RMSNorm):
    """Scale each token to a root mean square of one, then by a learned weight per channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., dim)."""
        assert self.eps is not None
        if torch.compiler.is_compiling():  # The compiler fuses the plain formula itself.
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        if not x.is_cpu or x.dtype != self.weight.dtype or x.itemsize < 4:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        if torch.is_grad_enabled():
            normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return normed
        return normalize(x, self.weight, self.eps)


def normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `x * rstd(x) * weight` for float32 or float64 on a CPU, without gradients."""
    return (x * _rstd(x, eps)).mul_(weight)


def _rstd(x: Tensor, eps: float) -> Tensor:
    """Return one over the root mean square of each token, (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_constant(eps, x), norm, norm, value=1.0 / x.size(-1)).rsqrt_()


_constants: dict[tuple[float, torch.dtype], Tensor] = {}


def _constant(value: float, x: Tensor) -> Tensor:
    """Return a number as a tensor of x's dtype: made anew, it costs as much as a kernel."""
    key = (value, x.dtype)
    constant = _constants.get(key) if type(x) is Tensor else None
    if constant is None:
        with torch.inference_mode(False):
            constant = torch.tensor(value, dtype=x.dtype, device="cpu")
        # A fake tensor holds no number and is valid only in the mode that made it.
        if type(constant) is Tensor:
            _constants[key] = constant
    return constant


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd = _rstd(x, eps)
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dim = x.size(-1)
        products = (grad * x).view(-1, dim)
        weight_grad = rstd.view(1, -1) @ products
        # d rstd / dx = -x rstd^3 / dim
        pull = (products @ weight).view_as(rstd) * rstd.pow(3).div_(-dim)
        x_grad = (grad * weight).mul_(rstd).addcmul_(x, pull)
        return x_grad, weight_grad.view(-1), None
