"""The product of a few tokens with a weight matrix, near the speed at which memory gives it.

A decoding step reads each weight for a handful of tokens, so memory bandwidth is its limit. The
CPU's matrix library misses that limit for two to eight rows unless the weight stands on the left:
measured, `W @ x.T` takes half the time of `x @ W.T` at four rows. One row is a matrix-vector
product.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MAX_ROWS", "add_few_rows_product", "few_rows_product", "is_plain"]

MAX_ROWS: Final = 8
"""Up to so many rows this is worth while; above, `F.linear` is as fast."""


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a module may be read for its weights instead of being called.

    Not so when it was replaced or wrapped, as LoRA does, or has a hook, a bias or a forward of its
    own.
    """
    own = module.__dict__
    return (
        type(module) is kind
        and "forward" not in own
        and own["_parameters"].get("bias") is None
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
    )


def few_rows_product(x: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Compute `x @ weight.T`.

    Args:
        x: `rows` vectors of width `in`, one after the other in memory, in any shape.
        weight: (out, in).
        rows: at most `MAX_ROWS`.

    Returns:
        (out,) for one row, else (rows, out); contiguous.
    """
    if rows == 1:
        return torch.mv(weight, x.view(-1))
    x = x.view(rows, -1)
    if rows > MAX_ROWS // 2 and weight.size(0) < weight.size(1):
        return F.linear(x, weight)
    return torch.mm(weight, x.t()).t().contiguous()


def add_few_rows_product(base: Tensor, x: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Compute `base + x @ weight.T`, in one operation for one row.

    Args:
        base: (rows, 1, out).
        x: as for `few_rows_product`.
        weight: (out, in).
        rows: at most `MAX_ROWS`.

    Returns:
        (rows, 1, out).
    """
    if rows == 1:
        return torch.addmv(base.view(-1), weight, x.view(-1)).view_as(base)
    return base + few_rows_product(x, weight, rows).view_as(base)
