"""Causal self-attention with rotary positions, for training, prefill and cached decoding alike.

Queries, keys and values come from one matrix product. They are rotated in the buffer that it
wrote, and their gradients meet in one buffer too, so that an evaluation keeps no second copy of
them.

Source: the Llama block; grouped key/value heads as in Ainslie et al. 2023.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from iiet.attend import attend
from iiet.context import AttentionContext
from iiet.linear import is_plain
from iiet.rope import RopeTables, rotate, rotate_

__all__ = ["Attention"]


class Attention(nn.Module):
    """Map (batch, time, dim) to (batch, time, dim) by causal attention.

    Args:
        dim: width of the hidden state.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = num_kv_heads * self.head_dim
        self.qkv = nn.Linear(dim, dim + 2 * kv_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: AttentionContext, slot: int) -> Tensor:
        """Attend within `x` and to the tokens in the cache's `slot`."""
        batch, time, dim = x.shape
        queries, keys, values = self._heads(x, context.rope)
        if context.cache is not None:
            keys, values = context.cache.update(keys, values, slot)
            if keys.size(2) != context.total:
                # A cache of fixed size returns its empty end too.
                keys, values = keys[:, :, : context.total], values[:, :, : context.total]
        mixed = attend(
            queries,
            keys,
            values,
            mask=context.mask,
            is_causal=context.mask is None and time > 1,
        )
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, dim))
        return result

    def _heads(self, x: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, each (batch, its heads, time, head_dim)."""
        shape = self.num_heads, self.num_kv_heads
        if not is_plain(self.qkv, nn.Linear):
            qkv = self.qkv(x).view(x.size(0), x.size(1), -1, self.head_dim)
            turned, values = qkv.tensor_split([self.num_heads + self.num_kv_heads], 2)
            return _split(torch.cat([rotate(turned, *rope), values], 2), *shape)
        if not torch.is_grad_enabled():
            return _project(x, self.qkv.weight, rope.cos, rope.sin, *shape)
        heads: tuple[Tensor, Tensor, Tensor] = _ProjectHeads.apply(  # type: ignore[no-untyped-call]
            x, self.qkv.weight, rope.cos, rope.sin, *shape
        )
        return heads


def _project(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Project to queries, keys and values and rotate the first two, all in one buffer."""
    qkv = F.linear(x, weight).view(x.size(0), x.size(1), -1, cos.size(-1))
    rotate_(qkv.narrow(2, 0, num_heads + num_kv_heads), cos, sin)
    return _split(qkv, num_heads, num_kv_heads)


def _split(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """View (batch, time, all heads, head_dim) as queries, keys and values, each (batch, heads,
    time, head_dim).
    """
    heads = qkv.transpose(1, 2)
    return (
        heads.narrow(1, 0, num_heads),
        heads.narrow(1, num_heads, num_kv_heads),
        heads.narrow(1, num_heads + num_kv_heads, num_kv_heads),
    )


class _ProjectHeads(torch.autograd.Function):
    """`_project`, with a backward pass that writes its three gradients into one buffer too."""

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
        return _project(x, weight, cos, sin, num_heads, num_kv_heads)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, query_grad: Tensor, key_grad: Tensor, value_grad: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        x, weight, cos, sin = ctx.saved_tensors
        num_turned = ctx.num_heads + ctx.num_kv_heads
        grad = query_grad.new_empty(*x.shape[:2], num_turned + ctx.num_kv_heads, cos.size(-1))
        for target, given in zip(
            _split(grad, ctx.num_heads, ctx.num_kv_heads),
            (query_grad, key_grad, value_grad),
            strict=True,
        ):
            target.copy_(given)
        rotate_(grad[:, :, :num_turned], cos, -sin)
        grad = grad.flatten(2)
        x_grad = grad @ weight.to(grad.dtype)
        weight_grad = grad.flatten(0, 1).t() @ x.flatten(0, 1).to(grad.dtype)
        return x_grad.to(x.dtype), weight_grad.to(weight.dtype), None, None, None, None
