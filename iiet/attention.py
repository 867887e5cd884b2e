"""Causal self-attention with rotary positions, for training, prefill and cached decoding alike.

Queries, keys and values come from one matrix product. What an evaluation needs beyond its input (angles, mask, cache)
is the same for all layers and corrections of a forward pass, so it is made once and passed along as one value,
`AttentionContext`.

Source: the Llama block; grouped key/value heads as in Ainslie et al. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from iiet.cache import DecodingCache
from iiet.rope import RopeTables, rotate

__all__ = ["Attention", "AttentionContext"]


@dataclass(frozen=True)
class AttentionContext:
    """What all evaluations of one forward pass share."""

    rope: RopeTables
    """Angles of the tokens of this pass."""
    mask: Tensor | None
    """(batch or 1, 1, time, total) bool, true where a query may look; None means causal without padding."""
    total: int
    """Tokens that queries may see: the cached ones and those of this pass."""
    cache: DecodingCache | None
    """Where keys and values of earlier tokens lie; None when all tokens are in this pass."""


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
        heads = self.qkv(x).view(batch, time, -1, self.head_dim)
        turned, values = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], 2)
        turned = rotate(turned, context.rope)
        queries, keys = turned.split([self.num_heads, self.num_kv_heads], 2)
        queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, values))
        if context.cache is not None:
            keys, values = context.cache.update(keys, values, slot)
            if keys.size(2) != context.total:  # A cache of fixed size returns its empty end too.
                keys, values = keys[:, :, : context.total], values[:, :, : context.total]
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=context.mask,
            is_causal=context.mask is None and time > 1,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, time, dim))
