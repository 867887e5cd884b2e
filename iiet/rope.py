"""Rotary position embedding: each pair of a head's channels turns by an angle that grows with the
token's position. Channels j and j + head_dim/2 are a pair (Llama's layout).

Angles, cosines and sines are float32 also in a bf16 model; a rotated head is rounded once.
Source: Su et al. 2021, RoFormer, section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rope", "RopeTables", "rotate"]


class RopeTables(NamedTuple):
    """Cosines and sines of some positions, each (time, 1, head_dim) or (batch, time, 1, head_dim).

    The sine's first half is negative, so that rotating is `x * cos + swap_halves(x) * sin`.
    """

    cos: Tensor
    sin: Tensor


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `heads`, (batch, time, heads, head_dim). With `-sin` it rotates back."""
    swapped = heads.roll(heads.size(-1) // 2, dims=-1)
    return torch.addcmul(heads * cos, swapped, sin).to(heads.dtype)


class Rope:
    """The rotary tables of one model, made on first use; not part of the state dict."""

    def __init__(self, head_dim: int, num_positions: int, theta: float) -> None:
        self.head_dim = head_dim
        self.num_positions = num_positions
        self.theta = theta
        self._tables: dict[tuple[torch.device, torch.dtype], RopeTables] = {}

    def at(self, positions: Tensor | slice, device: torch.device, dtype: torch.dtype) -> RopeTables:
        """Look up positions: a slice, or (batch, time); `dtype` is that of the hidden states."""
        # A table as exact as the model, and at least float32.
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = self._all_positions(device, dtype)
        return RopeTables(cos[positions], sin[positions])

    def _all_positions(self, device: torch.device, dtype: torch.dtype) -> RopeTables:
        if torch.compiler.is_compiling():  # A graph must not fill a dictionary outside of it.
            return self._make_tables(device, dtype)
        tables = self._tables.get((device, dtype))
        if tables is None:
            # Tables made in inference mode could not serve training later.
            with torch.inference_mode(False), torch.no_grad():
                tables = self._make_tables(device, dtype)
            # Fake tensors (tracing) hold no numbers and are valid in one mode only: do not keep.
            if type(tables.cos) is Tensor:
                self._tables[device, dtype] = tables
        return tables

    def _make_tables(self, device: torch.device, dtype: torch.dtype) -> RopeTables:
        channels = torch.arange(0, self.head_dim, 2, dtype=dtype, device="cpu") / self.head_dim
        positions = torch.arange(self.num_positions, dtype=dtype, device="cpu")
        angles = torch.outer(positions, 1.0 / self.theta**channels)
        cos, sin = angles.cos(), angles.sin()
        return RopeTables(
            torch.cat([cos, cos], -1).unsqueeze(1).to(device),
            torch.cat([-sin, sin], -1).unsqueeze(1).to(device),
        )
