"""The SwiGLU feed-forward network: `down(silu(gate(x)) * up(x))`, with gate and up in one matrix product.

Source: Shazeer 2020, GLU Variants Improve Transformer.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """Map (batch, time, dim) to (batch, time, dim), each token by itself.

    Args:
        dim: width of the hidden state.
        ffn_dim: inner width.
    """

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
