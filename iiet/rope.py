"""Rotary position embedding: each pair of a head's channels turns by an angle that grows with the
token's position.

Channels j and j + head_dim/2 form a pair ("halves", the Llama layout, not neighbours). The angles
depend on nothing but position, so cosines and sines are made once per device and dtype and looked
up afterwards; they are no part of the state dict. Rotating works in place on queries and keys,
which saves a copy of both per evaluation.

Source: Su et al. 2021, RoFormer, section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rope", "RopeTables", "rotate", "rotate_"]


class RopeTables(NamedTuple):
    """Cosines and sines of some positions, each (time, 1, head_dim) or (batch, time, 1, head_dim).

    The sine's first half is negative, so that rotating is `x * cos + swap_halves(x) * sin`.
    """

    cos: Tensor
    sin: Tensor


class Rope:
    """The rotary tables of one model: made on first use, for all positions up to the context's end.

    Args:
        head_dim: width of a head, even.
        num_positions: positions that are served, in tokens.
        theta: base of the wavelengths.
    """

    def __init__(self, head_dim: int, num_positions: int, theta: float) -> None:
        self.head_dim = head_dim
        self.num_positions = num_positions
        self.theta = theta
        self._tables: dict[tuple[torch.device, torch.dtype], RopeTables] = {}

    def tables(self, device: torch.device, dtype: torch.dtype) -> RopeTables:
        """Return the tables of all positions, each (num_positions, 1, head_dim)."""
        key = (device, dtype)
        tables = self._tables.get(key)
        if tables is None:
            # Tables first asked for in inference mode must serve training later.
            with torch.inference_mode(False), torch.no_grad():
                tables = self._make_tables(device, dtype)
            # A fake tensor holds no numbers and is valid only in the mode that made it.
            if type(tables.cos) is Tensor:
                self._tables[key] = tables
        return tables

    def _make_tables(self, device: torch.device, dtype: torch.dtype) -> RopeTables:
        # Angles in float32 as published; bfloat16 would merge positions beyond 256.
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        channels = torch.arange(0, self.head_dim, 2, dtype=exact, device="cpu") / self.head_dim
        positions = torch.arange(self.num_positions, dtype=exact, device="cpu")
        angles = torch.outer(positions, 1.0 / self.theta**channels)
        cos, sin = angles.cos(), angles.sin()
        return RopeTables(
            torch.cat([cos, cos], -1).unsqueeze(1).to(device, dtype),
            torch.cat([-sin, sin], -1).unsqueeze(1).to(device, dtype),
        )

    def at(self, positions: Tensor | slice, device: torch.device, dtype: torch.dtype) -> RopeTables:
        """Look up positions: a slice for the same in all rows, or a (batch, time) tensor of
        integers.
        """
        cos, sin = self.tables(device, dtype)
        return RopeTables(cos[positions], sin[positions])


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what `rotate_` computes, in a new tensor."""
    return torch.addcmul(heads * cos, heads.roll(heads.size(-1) // 2, dims=-1), sin)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs of `heads`, (batch, time, heads, head_dim), in place, and return it.

    The inverse is the rotation with `-sin`.
    """
    swapped = heads.roll(heads.size(-1) // 2, dims=-1)
    return heads.mul_(cos).addcmul_(swapped, sin)
