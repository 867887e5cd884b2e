"""Scaled dot-product attention with query heads that may share key heads, on any supported PyTorch.

PyTorch shares heads by itself from 2.5 on; before, keys and values are repeated, which gives the
same numbers and takes the memory of a model whose heads are not shared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend"]

_SHARES_HEADS = torch.__version__ >= "2.5"  # a TorchVersion, which compares as versions do
"""Whether PyTorch's attention lets query heads share key heads; before, the keys are repeated."""


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
    group = queries.size(1) // keys.size(1)
    if group == 1:
        return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=is_causal)
    if _SHARES_HEADS:
        return F.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=is_causal, enable_gqa=True
        )
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=is_causal)
