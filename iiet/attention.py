"""Scaled dot-product attention in which query heads may share key heads, by a fused kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iiet.precision import HALF

__all__ = ["attend"]


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Mix values by how well their keys match the queries; query heads may share key heads.

    Args:
        queries: (batch, heads, time, head_dim), as the result.
        keys: (batch, key heads, tokens, head_dim); heads is a multiple of key heads.
        values: of the shape of the keys.
        mask: as in `PassContext`; `is_causal` too.
    """
    num_sharing = queries.size(1) // keys.size(1)
    shares = num_sharing > 1 and _fused_kernel_shares_heads(queries, mask)
    if num_sharing > 1 and not shares:
        if queries.size(2) == 1:  # As many tokens of one head as query heads that share it.
            together = queries.reshape(len(queries), keys.size(1), num_sharing, -1)
            mixed = F.scaled_dot_product_attention(together, keys, values, mask)
            return mixed.reshape(queries.shape)
        keys = keys.repeat_interleave(num_sharing, dim=1)
        values = values.repeat_interleave(num_sharing, dim=1)
    return F.scaled_dot_product_attention(
        queries, keys, values, mask, is_causal=is_causal, enable_gqa=shares
    )


_CPU_SHARES_HEADS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
"""Whether the fused CPU kernel supports shared key heads (pytorch/pytorch#157893)."""


def _fused_kernel_shares_heads(queries: Tensor, mask: Tensor | None) -> bool:
    # Without a fused kernel PyTorch would use its math kernel, which stores all scores.
    if queries.is_cpu:  # Repeating a cache's keys takes ten times as long as attending to them.
        return _CPU_SHARES_HEADS
    return mask is None and queries.dtype in HALF
