"""Where a pass writes into a cache, and which tokens it sees, if not simply after all those held.

`Window` is for decoding steps of fixed shapes, `RowWindow` for rows of different lengths.

What changes from token to token is a value on the device, never a number in Python, so all steps
run the same kernels with the same arguments, and a CUDA graph can replay them. Attention reads a
fixed number of the cache's tokens; a mask hides the unused ones. The mask is added to the scores:
PyTorch would make such a mask of a boolean one in every call. cuDNN's kernel (half precision) and
the memory-efficient kernel accept it. The flash kernel accepts no mask; its form for lengths on the
device has no padding on the left, no float32, and no CPU version.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RowWindow", "Window"]


class Window:
    """The window of a batch on a cache of `max_tokens` tokens; `dtype` is that of the queries."""

    def __init__(
        self, batch_size: int, max_tokens: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.size = max_tokens
        """Attention reads the cache's first `size` tokens."""
        self.columns = torch.zeros(1, dtype=torch.long, device=device)
        """Where the step writes: the number of tokens before it, (1,)."""
        self._num_padding = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self._bias = torch.zeros(batch_size, 1, 1, max_tokens, dtype=dtype, device=device)

    def move(self, length: int, attention_mask: Tensor | None) -> None:
        """Set the window after `length` tokens; the mask, (batch, length), is false for padding."""
        self.columns.fill_(length)
        self._num_padding.zero_()
        self._bias.fill_(-torch.inf)
        seen = self._bias[:, 0, 0, :length]
        seen.zero_()
        if attention_mask is not None:
            seen.masked_fill_(~attention_mask, -torch.inf)
            self._num_padding.copy_((~attention_mask).sum(1, keepdim=True))

    def positions(self) -> Tensor:
        """Return the position of each row's token, (batch, 1); positions do not count padding."""
        return self.columns - self._num_padding

    def mask(self) -> Tensor:
        """Show the step its own token; return 0 for seen tokens, -inf else, (batch, 1, 1, size)."""
        self._bias.index_fill_(3, self.columns, 0.0)
        return self._bias.narrow(3, 0, self.size)

    def advance(self) -> None:
        """Set the window after one more token."""
        self.columns.add_(1)

    def write(self, held: Tensor, new: Tensor) -> None:
        """Put keys or values of the step's token, (batch, heads, 1, head_dim), into the cache's."""
        held.index_copy_(2, self.columns, new)


class RowWindow:
    """The window of one pass in which each row continues at a column of its own.

    Args:
        columns: where each row's new tokens go, (batch, new).
        size: attention reads the cache's first `size` tokens; at least all columns.
        padding: of the prompts, (batch, time), false for padding; None where there is none.
        num_positions: positions of the model's context; later ones, of rows that have ended, are
            read as the last.
        dtype: that of the queries.
    """

    def __init__(
        self,
        columns: Tensor,
        size: int,
        *,
        padding: Tensor | None,
        num_positions: int,
        dtype: torch.dtype,
    ) -> None:
        self.columns = columns
        self.size = size
        self._padding = padding
        self._last_position = num_positions - 1
        self._dtype = dtype

    def positions(self) -> Tensor:
        """Return the position of each new token, (batch, new); positions do not count padding."""
        positions = self.columns
        if self._padding is not None:
            positions = positions - (~self._padding).sum(1, keepdim=True)
        return positions.clamp_max(self._last_position)

    def mask(self) -> Tensor:
        """Return 0 for tokens that a new token sees, -inf else, (batch, 1, new, size)."""
        hidden = torch.arange(self.size, device=self.columns.device) > self.columns.unsqueeze(-1)
        if self._padding is not None:
            hidden[..., : self._padding.size(1)] |= ~self._padding.unsqueeze(1)
        bias = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
        return bias.masked_fill_(hidden, -torch.inf).unsqueeze(1)

    def write(self, held: Tensor, new: Tensor) -> None:
        """Put keys or values, (batch, heads, new, head_dim), into the cache's."""
        held.scatter_(2, self.columns[:, None, :, None].expand_as(new), new)
