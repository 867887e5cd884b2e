"""What all evaluations of one forward pass share: angles of the positions, mask and cache.

None of it depends on layer or correction, so it is worked out once per pass and handed down as one
value. Most passes need no mask at all: the kernel knows the causal one by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iiet.cache import DecodingCache
from iiet.decoding_step import is_token_step
from iiet.rope import Rope, RopeTables

__all__ = ["AttentionContext", "make_context"]


@dataclass(frozen=True)
class AttentionContext:
    """What all evaluations of one forward pass share."""

    rope: RopeTables
    """Angles of the tokens of this pass."""
    mask: Tensor | None
    """(batch or 1, 1, time, total) bool, true where a query may look; None means causal without
    padding.
    """
    total: int
    """Tokens that queries may see: the cached ones and those of this pass."""
    cache: DecodingCache | None
    """Where keys and values of earlier tokens lie; None when all tokens are in this pass."""
    is_token_step: bool = False
    """Whether `iiet.decoding_step` serves this pass."""


def make_context(
    hidden: Tensor, rope: Rope, *, cache: DecodingCache | None, attention_mask: Tensor | None
) -> AttentionContext:
    """Work out positions and mask of a pass.

    Args:
        hidden: the embeddings of the pass's tokens, (batch, time, dim).
        rope: tables for as many positions as the context has.
        cache: keys and values of earlier tokens.
        attention_mask: (batch, cached + time), false for padding. Positions count the true ones.

    Raises:
        ValueError: more tokens than the context.
    """
    time, device, dtype = hidden.size(1), hidden.device, hidden.dtype
    past = 0 if cache is None else int(cache.get_seq_length())
    total = past + time
    if total > rope.num_positions:
        raise ValueError(
            f"{total} tokens do not fit a context_length of {rope.num_positions}; "
            "shorten the input, or train with a longer context: later positions were never seen"
        )
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    positions: Tensor | slice = slice(past, total)
    mask = None
    if attention_mask is not None and not bool(attention_mask.all()):
        real = attention_mask.bool()
        positions = (real.cumsum(-1) - 1).clamp_min(0)[:, past:]
        mask = _causal(past, total, device, real)
    elif past and time > 1:
        mask = _causal(past, total, device)
    tables = rope.at(positions, device, dtype)
    return AttentionContext(
        tables, mask, total, cache, is_token_step(hidden, cached=cache is not None)
    )


def _causal(past: int, total: int, device: torch.device, real: Tensor | None = None) -> Tensor:
    """Return which of `total` tokens each of the last `total - past` may see.

    Args:
        past: tokens before those that look.
        total: tokens altogether.
        device: where the mask is needed.
        real: (batch, total), false for padding, which sees itself alone: a softmax needs at least
            one.

    Returns:
        (batch or 1, 1, total - past, total) bool.
    """
    keys = torch.arange(total, device=device)
    queries = keys[past:, None]
    if real is None:
        return (keys <= queries)[None, None]
    return ((keys < queries) & real[:, None, None, :]) | (keys == queries)
