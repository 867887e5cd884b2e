"""Faster CPU forms of what `iiet.model.layers` computes, and when they apply.

    rms_norm             keeps its input only: PyTorch has no fused kernel for it on a CPU, and its
                         operations keep the normalized input, too
    gated_product        SwiGLU keeps gate and up only; the backward pass recomputes the rest
    few_rows_product     the products of a decoding step, near the speed at which memory delivers
                         the weights; with it the norm and the sum of such a step

They read weights instead of calling modules, so a module that was replaced, wrapped or hooked since
then is called (`is_bare`). Plain formulas also serve other devices, `torch.compile` (which fuses
them itself), and passes that need other derivatives than a first backward pass: the transforms of
`torch.func`, forward-mode differentiation, and second derivatives, within `plain_formulas()`. A
decoding step steps aside for other attention than a plain Llama's (`Block.step_weights`). Tests
hold all equal to the plain formulas.
`IIET_CPU_KERNELS=0` turns them off, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

__all__ = [
    "add_few_rows_product",
    "can_step",
    "can_use_fast_linear",
    "can_use_rms_norm",
    "fast_forms_allowed",
    "few_rows_product",
    "few_rows_products",
    "gated_product",
    "is_bare",
    "is_intel_processor",
    "may_read_weights",
    "needs_all_derivatives",
    "normalize_few_rows",
    "plain_formulas",
    "rms_norm",
    "rotate_in_place",
]

ENABLED = os.environ.get("IIET_CPU_KERNELS", "1") != "0"
"""Whether the forms of this file are used. It is read at each call, and decides nothing else."""
MAX_ROWS: Final = 8  # Of a decoding step; for more tokens `F.linear` is as fast.
FEW_NUMBERS: Final = 2**15
"""Numbers of a weight that is so small that more operations take longer than reading it."""
NUMBERS_IN_SECOND_CACHE: Final = 2**19
"""Numbers of a weight that the second cache of a processor holds: 2 MiB of float32."""
_GLOBAL_HOOKS = (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
"""Hooks of all modules. PyTorch has no function that looks for any."""


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


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a formula may read the module's weight instead of calling the module.

    False if the module was replaced or wrapped (LoRA), has a hook, a bias or its own forward, or if
    its weight is a tensor subclass (quantized, distributed).
    """
    if type(module) is not kind:
        return False
    state = module.__dict__
    parameters = state["_parameters"]
    weight = parameters.get("weight")
    return (
        "forward" not in state
        and parameters.get("bias") is None
        # The class of a subclass's parameter is the subclass; looking for its attribute is slow.
        and (type(weight) is nn.Parameter or not hasattr(weight, "__tensor_flatten__"))
        and not state["_forward_hooks"]
        and not state["_forward_pre_hooks"]
        and not state["_backward_hooks"]
        and not state["_backward_pre_hooks"]
    )


def may_read_weights() -> bool:
    """Return whether formulas may read weights now instead of calling modules.

    Losses in chunks and CUDA graphs ask this, too; they need no form of this file.
    """
    return fast_forms_allowed() and not any(_GLOBAL_HOOKS)


def can_use_rms_norm(x: Tensor, weight: Tensor) -> bool:
    """Return whether `rms_norm` may replace PyTorch's."""
    return (
        ENABLED
        and x.is_cpu
        and x.dtype == weight.dtype
        and x.itemsize >= 4
        and not hasattr(weight, "__tensor_flatten__")
        and fast_forms_allowed()
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * weight` over the last axis."""
    if torch.is_grad_enabled():
        normed: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return normed
    return (x * _rstd(x, eps)).mul_(weight)


def _rstd(x: Tensor, eps: float) -> Tensor:
    """Compute `1 / sqrt(mean(x^2) + eps)`, (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_cached_scalar(eps, x), norm, norm, value=1.0 / x.size(-1)).rsqrt_()


_constants: dict[tuple[float, torch.dtype], Tensor] = {}


def _cached_scalar(value: float, x: Tensor) -> Tensor:
    """Return a number as a tensor, cached: making one costs as much as a kernel."""
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
    """Makes six passes over the hidden state instead of a dozen; keeps only input and `rstd`."""

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
        # The gradient of rotated heads is not contiguous.
        products = (grad * x).reshape(-1, dim)
        weight_grad = rstd.reshape(1, -1) @ products
        # d rstd / dx = -x rstd^3 / dim
        pull = (products @ weight).view_as(rstd) * rstd.pow(3).div_(-dim)
        x_grad = (grad * weight).mul_(rstd).addcmul_(x, pull)
        return x_grad, weight_grad.view(-1), None


def can_use_fast_linear(linear: nn.Module, x: Tensor) -> bool:
    """Return whether `gated_product` may replace the formula of this layer."""
    return ENABLED and x.is_cpu and may_read_weights() and is_bare(linear, nn.Linear)


def gated_product(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Compute `(silu(gate) * up) @ down.T`; gate and up are (..., ffn_dim)."""
    result: Tensor = _GatedProduct.apply(gate, up, down)  # type: ignore[no-untyped-call]
    return result


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, down)
        return F.linear(F.silu(gate).mul_(up), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, down = ctx.saved_tensors
        silu = F.silu(gate)
        inner_grad = grad @ down.to(grad.dtype)
        up_grad = inner_grad * silu
        gate_grad = torch.ops.aten.silu_backward(inner_grad.mul_(up), gate)
        if not ctx.needs_input_grad[2]:
            return gate_grad, up_grad, None
        inner = silu.mul_(up).flatten(0, -2)
        down_grad = (grad.flatten(0, -2).t() @ inner).to(down.dtype)
        return gate_grad, up_grad, down_grad


# A decoding step: one token in each of a few rows.


def can_step(hidden: Tensor) -> bool:
    """Return whether a pass over (batch, time, dim) may use the forms for one token per row."""
    return (
        ENABLED
        and hidden.is_cpu
        and hidden.size(1) == 1
        and hidden.size(0) <= MAX_ROWS
        and hidden.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and may_read_weights()
        and not torch.is_autocast_enabled("cpu")
    )


def normalize_few_rows(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Do `norm(x)` for (rows, 1, dim); of one row, (dim,) comes back."""
    assert norm.eps is not None
    if x.size(0) > 1:  # `len` of a tensor is a function in Python.
        return rms_norm(x, norm.weight, norm.eps)
    x = x.view(-1)
    rstd = (torch.dot(x, x).item() / x.size(0) + norm.eps) ** -0.5
    return torch.addcmul(_cached_scalar(0.0, x), x, norm.weight, value=rstd)


def rotate_in_place(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Do `iiet.model.layers.rotate` in place, for tables of the same dtype."""
    swapped = heads.roll(heads.size(-1) // 2, dims=-1)
    heads.mul_(cos).addcmul_(swapped, sin)


def few_rows_product(x: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Compute `x @ weight.T` near the speed at which memory delivers the weight.

    Args:
        x: `rows` vectors, (..., in).
        weight: (out, in), of a bare linear layer, or an embedding.
        rows: at most `MAX_ROWS`.

    Returns:
        (rows, out), or (out,) for one row; perhaps the transpose of a contiguous tensor.
    """
    if rows == 1:
        return torch.mv(weight, x if x.dim() == 1 else x.view(-1))
    x = x.view(rows, -1).contiguous()
    if _is_faster_on_the_right(weight, rows):
        return F.linear(x, weight)
    return torch.mm(weight, x.t()).t()


def few_rows_products(x: Tensor, weights: Sequence[Tensor], rows: int) -> Tensor:
    """Compute several products of the same `x`, beside each other, (rows, sum of out)."""
    products = [few_rows_product(x, weight, rows) for weight in weights]
    if products[0].is_contiguous():
        return torch.cat(products, -1)
    # Transposing once what is joined takes half the time of joining what is transposed.
    return torch.cat([product.t() for product in products]).t().contiguous()


def _is_faster_on_the_right(weight: Tensor, rows: int) -> bool:
    """Return whether two to eight rows take less time as `x @ W.T` than as `W @ x.T`.

    For small weights the left has more operations. For others it depends: PyTorch's matrix library
    has other kernels for Intel's processors. There, two rows take half the time on the right, and
    eight rows if a processor's second cache holds the weight. On an AMD EPYC, two rows take half
    the time on the left. The choice is made by the processor, not by timing, so that a machine
    always computes the same.
    """
    if weight.numel() <= FEW_NUMBERS:
        return True
    if is_intel_processor():
        return rows <= MAX_ROWS // 2 or weight.numel() <= NUMBERS_IN_SECOND_CACHE
    return rows > MAX_ROWS // 2 and weight.size(0) < weight.size(1)


@cache
def is_intel_processor() -> bool:
    """Return whether the processor is one of Intel's; False where the system is not Linux."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def add_few_rows_product(base: Tensor, x: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Compute `base + x @ weight.T`, (rows, 1, out); one operation for one row."""
    if rows == 1:
        return torch.addmv(base.view(-1), weight, x.view(-1)).view_as(base)
    return base + few_rows_product(x, weight, rows).view_as(base)
