"""Hand-written forms of the model's formulas, where eager PyTorch wastes time or memory.

    rms_norm         PyTorch has no fused kernel for it on a CPU
    project_heads    queries, keys and values stay in the buffer that their product wrote
    gated_product    SwiGLU keeps gate and up only; the backward pass recomputes the rest
    product          a linear layer of a field in bfloat16

`project_heads` and `gated_product` also halve an evaluation's memory on a GPU in eager mode. A
field for one token is in `iiet.token_step`. Tests hold all equal to the plain formulas in
`iiet.layers`. They read weights instead of calling modules, so they replace bare modules only
(`is_bare`). `IIET_CPU_KERNELS=0` turns them off.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from iiet.plain import fast_forms_allowed

__all__ = [
    "cached_scalar",
    "gated_product",
    "is_bare",
    "may_read_weights",
    "product",
    "project_heads",
    "rms_norm",
    "rotate_",
    "rotate_into",
    "serves_linear",
    "serves_norm",
]

ENABLED = os.environ.get("IIET_CPU_KERNELS", "1") != "0"
_GLOBAL_HOOKS = (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
"""Hooks of all modules. PyTorch 2.6 has no function that looks for any."""


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a formula may read the module's weight instead of calling the module.

    False if the module was replaced or wrapped (LoRA), has a hook, a bias or its own forward, or if
    its weight is a tensor subclass (quantized, distributed).
    """
    own = module.__dict__
    return (
        type(module) is kind
        and "forward" not in own
        and own["_parameters"].get("bias") is None
        and not hasattr(own["_parameters"].get("weight"), "__tensor_flatten__")
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
    )


def may_read_weights() -> bool:
    """Tell whether forms that read weights instead of calling modules are allowed now."""
    return ENABLED and fast_forms_allowed() and not any(_GLOBAL_HOOKS)


def serves_linear(linear: nn.Module) -> bool:
    """Tell whether `project_heads` or `gated_product` may replace the formula of this layer."""
    return may_read_weights() and is_bare(linear, nn.Linear)


def serves_norm(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `rms_norm` may replace `F.rms_norm`."""
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
    return torch.addcmul(cached_scalar(eps, x), norm, norm, value=1.0 / x.size(-1)).rsqrt_()


_constants: dict[tuple[float, torch.dtype], Tensor] = {}


def cached_scalar(value: float, x: Tensor) -> Tensor:
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
        products = (grad * x).view(-1, dim)
        weight_grad = rstd.view(1, -1) @ products
        # d rstd / dx = -x rstd^3 / dim
        pull = (products @ weight).view_as(rstd) * rstd.pow(3).div_(-dim)
        x_grad = (grad * weight).mul_(rstd).addcmul_(x, pull)
        return x_grad, weight_grad.view(-1), None


def project_heads(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Project x, (batch, time, dim), to queries, keys and values and rotate the first two.

    All three are views of one buffer, each (batch, its heads, time, head_dim). The rows of `weight`
    are queries, then keys, then values; `cos` and `sin` are as in `iiet.rope`.
    """
    if not torch.is_grad_enabled():
        return _project(x, weight, cos, sin, num_heads, num_kv_heads)
    heads: tuple[Tensor, Tensor, Tensor] = _ProjectHeads.apply(  # type: ignore[no-untyped-call]
        x, weight, cos, sin, num_heads, num_kv_heads
    )
    return heads


def _project(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    qkv = F.linear(x, weight).view(x.size(0), x.size(1), -1, cos.size(-1))
    turned = qkv.narrow(2, 0, num_heads + num_kv_heads)
    if x.is_cpu:
        rotate_(turned, cos, sin)
    else:
        rotate_into(turned, turned, cos, *sin.chunk(2, -1))
    return _split(qkv, num_heads, num_kv_heads)


def _split(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.transpose(1, 2)
    queries, keys, values = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 1)
    return queries, keys, values


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Do `iiet.rope.rotate` in place."""
    swapped = heads.roll(heads.size(-1) // 2, dims=-1)
    if heads.dtype == cos.dtype:
        heads.mul_(cos).addcmul_(swapped, sin)
    else:  # Computed in float32 and rounded once, on writing.
        torch.addcmul(heads * cos, swapped, sin, out=heads)


def rotate_into(
    target: Tensor, heads: Tensor, cos: Tensor, first_sin: Tensor, second_sin: Tensor
) -> None:
    """Do `rotate` with the two halves of a sine's table; `target` may be `heads`.

    Moves a fifth less memory than `rotate_`, in as many kernels.
    """
    first, second = heads.chunk(2, -1)
    turned = torch.empty(heads.shape, dtype=cos.dtype, device=heads.device)
    first_turned, second_turned = turned.chunk(2, -1)
    torch.mul(second, first_sin, out=first_turned)
    torch.mul(first, second_sin, out=second_turned)
    # Computed in float32 and rounded once, on writing.
    torch.addcmul(turned, heads, cos, out=target)


class _ProjectHeads(torch.autograd.Function):
    """`_project`; the backward pass, too, writes its three gradients into one buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        num_kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.gradient_sum = _gradient_sum(weight)
        ctx.num_heads, ctx.num_kv_heads = num_heads, num_kv_heads
        return _project(x, weight, cos, sin, num_heads, num_kv_heads)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, query_grad: Tensor, key_grad: Tensor, value_grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        num_turned = ctx.num_heads + ctx.num_kv_heads
        grad = query_grad.new_empty(*x.shape[:2], num_turned + ctx.num_kv_heads, cos.size(-1))
        targets = _split(grad, ctx.num_heads, ctx.num_kv_heads)
        targets[2].copy_(value_grad)
        if x.is_cpu:
            targets[0].copy_(query_grad)
            targets[1].copy_(key_grad)
            rotate_(grad[:, :, :num_turned], cos, -sin)
        else:
            # Back: the sine's second half is its first half with the other sign.
            second_sin, first_sin = sin.transpose(-2, -3).chunk(2, -1)
            cos = cos.transpose(-2, -3)
            rotate_into(targets[0], query_grad, cos, first_sin, second_sin)
            rotate_into(targets[1], key_grad, cos, first_sin, second_sin)
        return *_linear_gradients(ctx, x, weight, grad.flatten(2)), None, None, None, None


def _linear_gradients(
    ctx: Any, x: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `F.linear(x, weight)` that are needed."""
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    x_grad = (grad @ weight.to(grad.dtype)).to(x.dtype) if needs_x else None
    if not needs_weight:
        return x_grad, None
    return x_grad, _weight_gradient(ctx, x.to(grad.dtype), weight, grad)


def _weight_gradient(ctx: Any, x: Tensor, weight: Tensor, grad: Tensor) -> Tensor | None:
    if ctx.gradient_sum is not None:
        ctx.gradient_sum.add_product(grad, x)
        return None
    return (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)


def _gradient_sum(weight: Tensor) -> Any:
    """Return the `GradientSum` of a copy that `iiet.half_weights` made; else None."""
    return getattr(weight, "gradient_sum", None)


def product(linear: nn.Module, x: Tensor) -> Tensor:
    """Compute `linear(x)`; a copied weight's gradient is added to its sum by the product itself."""
    weight: Any = getattr(linear, "weight", None)
    if torch.is_grad_enabled() and _gradient_sum(weight) is not None and serves_linear(linear):
        result: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    else:
        result = linear(x)
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient_sum = _gradient_sum(weight)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return _linear_gradients(ctx, x, weight, grad)


def gated_product(gate_up: Tensor, down: Tensor) -> Tensor:
    """Compute `(silu(gate) * up) @ down.T`; `gate_up` is (..., 2 ffn_dim), gate then up."""
    if not torch.is_grad_enabled():
        return _gated_product(gate_up, down)
    result: Tensor = _GatedProduct.apply(gate_up, down)  # type: ignore[no-untyped-call]
    return result


def _gated_product(gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.linear(F.silu(gate).mul_(up), down)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, down)
        ctx.gradient_sum = _gradient_sum(down)
        return _gated_product(gate_up, down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate_up, down = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        inner_grad = grad @ down.to(grad.dtype)
        gate_up_grad = torch.empty_like(gate_up)
        gate_grad, up_grad = gate_up_grad.chunk(2, dim=-1)
        torch.mul(inner_grad, silu, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(inner_grad.mul_(up), gate, grad_input=gate_grad)
        if not ctx.needs_input_grad[1]:
            return gate_up_grad, None
        return gate_up_grad, _weight_gradient(ctx, silu.mul_(up), down, grad)
