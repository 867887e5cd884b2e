"""Faster CPU forms of `iiet.layers`, installed into a decoder by `accelerate`.

    rms_norm          PyTorch has no fused kernel for it on a CPU
    project_heads     queries, keys and values stay in the buffer that their product wrote
    gated_product     SwiGLU keeps gate and up only; the backward pass recomputes the rest
    a field of one    in a decoding step each weight is read once, which evicts the interpreter
    token per row     from the processor's cache, so each operation, view and module call costs
                      several times as much: few operations, and products at memory's speed

They read weights instead of calling modules, so a module that was replaced, wrapped or hooked since
then gets the plain formula (`is_bare`); so do other devices, `torch.compile`, and passes that need
other derivatives than a first backward pass. Tests hold all equal to the plain formulas.
`IIET_CPU_KERNELS=0` turns them off, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Final

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

from iiet.arithmetic import fast_forms_allowed
from iiet.layers import (
    Attention,
    FeedForward,
    Field,
    PassContext,
    RMSNorm,
    RopeTables,
    attend,
)

__all__ = [
    "accelerate",
    "can_step",
    "can_use_fast_linear",
    "few_rows_product",
    "gated_product",
    "is_bare",
    "may_read_weights",
    "project_heads",
    "rms_norm",
]

ENABLED = os.environ.get("IIET_CPU_KERNELS", "1") != "0"
"""Whether the forms of this file are used. It is read at each call, and decides nothing else."""
MAX_ROWS: Final = 8  # Of a decoding step; for more tokens `F.linear` is as fast.
_GLOBAL_HOOKS = (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
"""Hooks of all modules. PyTorch has no function that looks for any."""


def accelerate(decoder: nn.Module) -> None:
    """Let the modules of a decoder compute by the fast forms where these apply."""
    if ENABLED:
        for module in decoder.modules():
            module.__class__ = _FAST_FORMS.get(type(module), type(module))


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a formula may read the module's weight instead of calling the module.

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
    """Return whether formulas may read weights now instead of calling modules.

    Losses in chunks and CUDA graphs ask this, too; they need no form of this file.
    """
    return fast_forms_allowed() and not any(_GLOBAL_HOOKS)


def can_use_fast_linear(linear: nn.Module, x: Tensor) -> bool:
    """Return whether `project_heads` or `gated_product` may replace the formula of this layer."""
    return ENABLED and x.is_cpu and may_read_weights() and is_bare(linear, nn.Linear)


# Training and reading a prompt: each form is a function of tensors, and a module that calls it.


class FastRMSNorm(RMSNorm):
    """`RMSNorm` by `rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., dim)."""
        weight = self.weight
        if (
            ENABLED
            and x.is_cpu
            and x.dtype == weight.dtype
            and x.itemsize >= 4
            and not hasattr(weight, "__tensor_flatten__")
            and fast_forms_allowed()
        ):
            assert self.eps is not None
            return rms_norm(x, weight, self.eps)
        return super().forward(x)


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
        products = (grad * x).view(-1, dim)
        weight_grad = rstd.view(1, -1) @ products
        # d rstd / dx = -x rstd^3 / dim
        pull = (products @ weight).view_as(rstd) * rstd.pow(3).div_(-dim)
        x_grad = (grad * weight).mul_(rstd).addcmul_(x, pull)
        return x_grad, weight_grad.view(-1), None


class FastAttention(Attention):
    """`Attention` by `project_heads`."""

    def heads(self, x: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, each (batch, its heads, time, head_dim)."""
        if can_use_fast_linear(self.qkv, x):
            return project_heads(x, self.qkv.weight, *rope, self.num_heads, self.num_kv_heads)
        return super().heads(x, rope)


def project_heads(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Project x, (batch, time, dim), to queries, keys and values and rotate the first two.

    All three are views of one buffer, each (batch, its heads, time, head_dim).
    """
    heads: tuple[Tensor, Tensor, Tensor] = _ProjectHeads.apply(  # type: ignore[no-untyped-call]
        x, weight, cos, sin, num_heads, num_kv_heads
    )
    return heads


def _split(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.transpose(1, 2)
    queries, keys, values = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 1)
    return queries, keys, values


def _rotate_in_place(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Do `iiet.layers.rotate` in place."""
    swapped = heads.roll(heads.size(-1) // 2, dims=-1)
    if heads.dtype == cos.dtype:
        heads.mul_(cos).addcmul_(swapped, sin)
    else:  # Computed in float32 and rounded once, on writing.
        torch.addcmul(heads * cos, swapped, sin, out=heads)


class _ProjectHeads(torch.autograd.Function):
    """The backward pass, too, writes its three gradients into one buffer."""

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
        ctx.num_heads, ctx.num_kv_heads = num_heads, num_kv_heads
        qkv = F.linear(x, weight).view(x.size(0), x.size(1), -1, cos.size(-1))
        _rotate_in_place(qkv.narrow(2, 0, num_heads + num_kv_heads), cos, sin)
        return _split(qkv, num_heads, num_kv_heads)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, query_grad: Tensor, key_grad: Tensor, value_grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        num_turned = ctx.num_heads + ctx.num_kv_heads
        grad = query_grad.new_empty(*x.shape[:2], num_turned + ctx.num_kv_heads, cos.size(-1))
        targets = _split(grad, ctx.num_heads, ctx.num_kv_heads)
        for target, own in zip(targets, (query_grad, key_grad, value_grad), strict=True):
            target.copy_(own)
        _rotate_in_place(grad[:, :, :num_turned], cos, -sin)
        grad = grad.flatten(2)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        x_grad = (grad @ weight.to(grad.dtype)).to(x.dtype) if needs_x else None
        weight_grad = _weight_gradient(x.to(grad.dtype), weight, grad) if needs_weight else None
        return x_grad, weight_grad, None, None, None, None


def _weight_gradient(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    return (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)


class FastFeedForward(FeedForward):
    """`FeedForward` by `gated_product`."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network."""
        if can_use_fast_linear(self.down, x):
            return gated_product(self.gate_up(x), self.down.weight)
        return super().forward(x)


def gated_product(gate_up: Tensor, down: Tensor) -> Tensor:
    """Compute `(silu(gate) * up) @ down.T`; `gate_up` is (..., 2 ffn_dim), gate then up."""
    result: Tensor = _GatedProduct.apply(gate_up, down)  # type: ignore[no-untyped-call]
    return result


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, down)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), down)

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
        return gate_up_grad, _weight_gradient(silu.mul_(up), down, grad)


# A decoding step: a field for one token per row.


def can_step(hidden: Tensor, fields: Iterable[nn.Module]) -> bool:
    """Return whether all fields may compute a cached pass over (batch, time, dim) by the form for
    one token per row; so may `few_rows_product`, for the head."""
    return (
        ENABLED
        and hidden.is_cpu
        and hidden.size(1) == 1
        and hidden.size(0) <= MAX_ROWS
        and hidden.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and may_read_weights()
        and not torch.is_autocast_enabled("cpu")
        and all(map(_is_bare_field, fields))
    )


def _is_bare_field(field: nn.Module) -> bool:
    if not is_bare(field, FastField):
        return False
    for name, module in field._modules.items():  # Attribute access would take three times as long.
        if module is None or not is_bare(module, _PARTS[name]):
            return False
        for linear in module._modules.values():
            if linear is None or not is_bare(linear, nn.Linear):
                return False
    return True


class FastField(Field):
    """`Field`, in few operations where `PassContext.is_token_step` says that it may."""

    def forward(self, x: Tensor, context: PassContext, slot: int | None = None) -> Tensor:
        """Evaluate F(x), (batch, time, dim) to (batch, time, dim)."""
        if not context.is_token_step:
            return super().forward(x, context, slot)
        assert slot is not None
        assert context.cache is not None
        attention, network, batch = self.attention, self.feed_forward, len(x)
        num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
        qkv = few_rows_product(_normalized(x, self.attention_norm), attention.qkv, batch)
        # With one token, heads before time is the same memory as time before heads.
        heads = qkv.view(batch, -1, 1, attention.head_dim)
        _rotate_in_place(heads.narrow(1, 0, num_heads + num_kv_heads), *context.rope)
        new = heads.narrow(1, num_heads, 2 * num_kv_heads)
        keys, values = context.cache.append(new, slot)
        queries = heads.narrow(1, 0, num_heads)
        mixed = attend(queries, keys, values, mask=context.mask, is_causal=False)
        u = _add_few_rows_product(x, mixed, attention.out, batch)
        normed = _normalized(u, self.feed_forward_norm)
        gate, up = few_rows_product(normed, network.gate_up, batch).chunk(2, -1)
        return _add_few_rows_product(u, F.silu(gate).mul_(up), network.down, batch)


def _normalized(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    assert norm.eps is not None
    if len(x) > 1:
        return rms_norm(x, norm.weight, norm.eps)
    x = x.view(-1)
    rstd = (torch.dot(x, x).item() / len(x) + norm.eps) ** -0.5
    return torch.addcmul(_cached_scalar(0.0, x), x, norm.weight, value=rstd)


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
    x = x.view(rows, -1)
    if _is_faster_on_the_right(weight, rows):
        return F.linear(x, weight)
    return torch.mm(weight, x.t()).t().contiguous()


def _is_faster_on_the_right(weight: Tensor, rows: int) -> bool:
    """Return whether two to eight rows take less time as `x @ W.T` than as `W @ x.T`.

    PyTorch's matrix library has other kernels for Intel's processors. There, two rows take half the
    time on the right, and eight rows if a processor's second cache holds the weight. On an AMD
    EPYC, four rows take half the time on the left. The choice is made by the processor, not by
    timing, so that a machine always computes the same.
    """
    if _is_intel():
        return rows <= MAX_ROWS // 2 or weight.numel() <= _NUMBERS_IN_SECOND_CACHE
    return rows > MAX_ROWS // 2 and weight.size(0) < weight.size(1)


_NUMBERS_IN_SECOND_CACHE: Final = 2**19  # 2 MiB of float32.


@cache
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # Not Linux.
        return False


def _add_few_rows_product(base: Tensor, x: Tensor, linear: nn.Linear, rows: int) -> Tensor:
    """Compute `base + x @ weight.T`, (rows, 1, out); one operation for one row."""
    if rows == 1:
        return torch.addmv(base.view(-1), linear.weight, x.view(-1)).view_as(base)
    return base + few_rows_product(x, linear, rows).view_as(base)


_FAST_FORMS: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: FastRMSNorm,
    Attention: FastAttention,
    FeedForward: FastFeedForward,
    Field: FastField,
}
_PARTS: dict[str, type[nn.Module]] = {
    "attention_norm": FastRMSNorm,
    "attention": FastAttention,
    "feed_forward_norm": FastRMSNorm,
    "feed_forward": FastFeedForward,
}
