"""Scaled dot-product attention with query heads that may share key heads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend"]


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, is_causal: bool = False
) -> Tensor:
    """Mix values by how well their keys match the queries; query heads may share key heads.

    Args:
        queries: (batch, heads, time, head_dim).
        keys: (batch, key heads, tokens, head_dim); heads is a multiple of key heads.
        values: of the shape of the keys.
        mask: broadcastable to (batch, heads, time, tokens), true where a query looks; None for no
            mask.
        is_causal: whether a query looks at no later token; without a mask only.

    Returns:
        (batch, heads, time, head_dim).
    """
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        mask,
        is_causal=is_causal,
        enable_gqa=queries.size(1) != keys.size(1),
    )
