"""The product of tokens with a weight matrix, with a shorter way for the few tokens of a decoding
step.

A step reads each weight once for a handful of tokens, so memory bandwidth is its limit. The CPU's
matrix library misses that limit for two to eight rows unless the weight stands on the left:
measured, `W @ x.T` takes half the time of `x @ W.T` at four rows. One row is a matrix-vector
product. In training and prefill this is `F.linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear"]

_MAX_ROWS = 8


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `x @ weight.T`, (..., in) and (out, in) to (..., out)."""
    rows = x.numel() // x.size(-1)
    if (
        rows > _MAX_ROWS
        or torch.is_grad_enabled()
        or x.device.type != "cpu"
        or x.dtype != weight.dtype
        or x.itemsize < 4
    ):
        return F.linear(x, weight)
    if rows == 1:
        return torch.mv(weight, x.view(-1)).view(*x.shape[:-1], -1)
    if rows > _MAX_ROWS // 2 and weight.size(0) < weight.size(1):
        return F.linear(x, weight)
    product = torch.mm(weight, x.reshape(rows, -1).t())
    return product.t().contiguous().view(*x.shape[:-1], -1)
