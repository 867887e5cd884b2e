"""The field of a layer: one pre-norm Llama block, a function from hidden states to hidden states.

    u    = x + attention(norm1(x))
    F(x) = u + feed_forward(norm2(u))

Both residual connections are inside, so the plain decoder is `h_l = F_l(h_{l-1})`, and every other
method is a way to evaluate the same F more often. One run of a field is an *evaluation*, the unit
of cost. Each module's `forward` is the plain formula; where its first lines ask `cpu_kernels`, a
faster form of the same formula may replace it.

Source: Touvron et al. 2023 (Llama); grouped key/value heads as in Ainslie et al. 2023; SwiGLU,
Shazeer 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iiet.config import ModelConfig
from iiet.context import PassContext
from iiet.cpu_kernels import (
    gated_product,
    product,
    project_heads,
    rms_norm,
    serves_linear,
    serves_norm,
)
from iiet.precision import HALF
from iiet.rope import rotate
from iiet.token_step import evaluate_token

__all__ = ["Attention", "FeedForward", "Field", "RMSNorm"]


class Attention(nn.Module):
    """Map (batch, time, dim) to (batch, time, dim) by causal attention with rotary positions.

    One matrix makes queries, keys and values.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, dim + 2 * num_kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: PassContext, slot: int | None) -> Tensor:
        """Attend within `x` and to the tokens in the cache's `slot`."""
        mixed = context.attend(*self._heads(x, context), slot)
        return product(self.out, mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, context: PassContext) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, each (batch, its heads, time, head_dim)."""
        num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
        if serves_linear(self.qkv):
            return project_heads(x, self.qkv.weight, *context.rope, num_heads, num_kv_heads)
        heads = self.qkv(x).view(x.size(0), x.size(1), -1, self.head_dim)
        turned, values = heads.split_with_sizes([num_heads + num_kv_heads, num_kv_heads], 2)
        queries, keys = rotate(turned, *context.rope).split_with_sizes([num_heads, num_kv_heads], 2)
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


class FeedForward(nn.Module):
    """Map (batch, time, dim) to (batch, time, dim), each token by itself: `down(silu(gate) * up)`.

    One matrix makes gate and up.
    """

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network."""
        gate_up = product(self.gate_up, x)
        if serves_linear(self.down):
            return gated_product(gate_up, self.down.weight)
        gate, up = gate_up.chunk(2, dim=-1)
        result: Tensor = self.down(F.silu(gate) * up)
        return result


class RMSNorm(nn.RMSNorm):
    """Scale each token to a root mean square of one, then by a learned weight per channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., dim)."""
        assert self.eps is not None
        if serves_norm(x, self.weight):
            return rms_norm(x, self.weight, self.eps)
        # The fused kernel needs one dtype, and autocast would make that float32.
        weight = self.weight.to(x.dtype)
        if x.dtype in HALF and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Field(nn.Module):
    """One layer's block."""

    bare_parts: ClassVar[Mapping[str, type[nn.Module]]] = {
        "attention_norm": RMSNorm,
        "attention": Attention,
        "feed_forward_norm": RMSNorm,
        "feed_forward": FeedForward,
    }
    """The modules that `token_step.evaluate_token` reads; replaced ones are called instead."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.rms_norm_eps
        self.attention_norm = RMSNorm(dim, eps=eps)
        self.attention = Attention(dim, config.num_heads, config.num_kv_heads)
        self.feed_forward_norm = RMSNorm(dim, eps=eps)
        self.feed_forward = FeedForward(dim, config.ffn_dim)

    def forward(
        self,
        x: Tensor,
        context: PassContext,
        slot: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Evaluate F(x), (batch, time, dim) to (batch, time, dim).

        Args:
            x: where to evaluate.
            context: what all evaluations of this pass share.
            slot: the cache slot of this evaluation; None without a cache.
            dtype: of the result; None for that of `x`.
        """
        if context.is_token_step:
            return evaluate_token(self, x, context, slot)
        u: Tensor = x + self.attention(self.attention_norm(x), context, slot)
        change: Tensor = self.feed_forward(self.feed_forward_norm(u))
        # `torch.add(..., out=)` would round to bfloat16 first.
        return (u if dtype is None else u.to(dtype)) + change
