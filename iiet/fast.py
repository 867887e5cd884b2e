"""Faster CPU forms of what `iiet.layers` computes, and when they apply.

    gated_product        SwiGLU keeps gate and up only; the backward pass recomputes the rest
    few_rows_product     the products of a decoding step, near the speed at which memory delivers
                         the weights; with it the norm and the sum of such a step

They read weights instead of calling modules, so a module that was replaced, wrapped or hooked since
then is called (`is_bare`). Plain formulas also serve other devices, `torch.compile` (which fuses
them itself), and passes that need other derivatives than a first backward pass: the transforms of
`torch.func`, forward-mode differentiation, and second derivatives, within `plain_formulas()`. Tests
hold all equal to the plain formulas.
`IIET_CPU_KERNELS=0` turns them off, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    "fast_forms_allowed",
    "few_rows_product",
    "gated_product",
    "is_bare",
    "may_read_weights",
    "needs_all_derivatives",
    "normalize_few_rows",
    "plain_formulas",
    "rotate_in_place",
]

ENABLED = os.environ.get("IIET_CPU_KERNELS", "1") != "0"
"""Whether the forms of this file are used. It is read at each call, and decides nothing else."""
MAX_ROWS: Final = 8  # Of a decoding step; for more tokens the plain formulas are as fast.
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
    return (
        "forward" not in state
        and state["_parameters"].get("bias") is None
        and not hasattr(state["_parameters"].get("weight"), "__tensor_flatten__")
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
    if len(x) > 1:
        return F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)
    x = x.view(-1)
    rstd = (torch.dot(x, x).item() / len(x) + norm.eps) ** -0.5
    normed: Tensor = (x * rstd).mul_(norm.weight)
    return normed


def rotate_in_place(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Do `iiet.layers.rotate` in place, for tables of the same dtype."""
    swapped = heads.roll(heads.size(-1) // 2, dims=-1)
    heads.mul_(cos).addcmul_(swapped, sin)


def few_rows_product(x: Tensor, linear: nn.Module, rows: int) -> Tensor:
    """Compute `x @ weight.T` near the speed at which memory delivers the weight.

    Args:
        x: `rows` contiguous vectors, in any shape.
        linear: holds the weight, (out, in): a bare linear layer, or an embedding.
        rows: at most `MAX_ROWS`.

    Returns:
        (rows, out), or (out,) for one row; contiguous.
    """
    weight: Tensor = linear.weight  # type: ignore[assignment]
    if rows == 1:
        return torch.mv(weight, x.view(-1))
    return F.linear(x.view(rows, -1), weight)


def add_few_rows_product(base: Tensor, x: Tensor, linear: nn.Module, rows: int) -> Tensor:
    """Compute `base + x @ weight.T`, (rows, 1, out); one operation for one row."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    if rows == 1:
        return torch.addmv(base.view(-1), weight, x.view(-1)).view_as(base)
    return base + few_rows_product(x, linear, rows).view_as(base)
