"""Where a decoding step of fixed shapes writes into a cache, and which tokens it sees.

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

__all__ = ["Window"]


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
