"""What all evaluations of one forward pass share: angles of the positions, mask and cache.

Positions count the tokens that are no padding. A cache remembers the padding it was filled with, so
that later passes need no mask, and one that contradicts it is refused.

None of it depends on layer or correction, so it is worked out once per pass and handed down as one
value. Most passes need no mask at all: the kernel knows the causal one by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iiet.cache import CacheRecord, DecodingCache
from iiet.decoding_step import is_plain_field, is_token_step
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
    hidden: Tensor,
    rope: Rope,
    *,
    fields: Iterable[nn.Module] = (),
    cache: DecodingCache | None = None,
    record: CacheRecord | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> AttentionContext:
    """Work out positions and mask of a pass.

    Args:
        hidden: the embeddings of the pass's tokens, (batch, time, dim).
        rope: tables for as many positions as the context has.
        fields: those that the pass evaluates.
        cache: keys and values of earlier tokens.
        record: the cache's; the padding is read from it and noted in it.
        attention_mask: (batch, cached + time), false for padding; None where the cache remembers
            all padding, or there is none.
        position_ids: (batch or 1, time); None to count the tokens that are no padding. Without
            mask and cache, positions that do not go on by one start another sequence, which sees
            nothing of the one before.

    Raises:
        ValueError: more tokens or larger positions than the context has, or a mask or positions of
            the wrong shape, or a mask that contradicts the cache.
    """
    batch, time = hidden.shape[:2]
    device, dtype = hidden.device, hidden.dtype
    past = 0 if cache is None else int(cache.get_seq_length())
    total = past + time
    if position_ids is None and total > rope.num_positions:
        raise ValueError(
            f"{total} tokens do not fit a context_length of {rope.num_positions}; "
            "shorten the input, or train with a longer context: later positions were never seen"
        )
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    real = _real_tokens(attention_mask, record, batch=batch, past=past, time=time)
    if record is not None:
        record.attention_mask = real
    positions: Tensor | slice = slice(past, total)
    if position_ids is not None:
        _check_positions(position_ids, batch=batch, time=time, num_positions=rope.num_positions)
        positions = position_ids
    elif real is not None:
        positions = (real.cumsum(-1) - 1).clamp_min(0)[:, past:]
    mask = None
    if real is not None or (past and time > 1):
        mask = _causal(past, total, device, real)
    elif position_ids is not None and cache is None:
        mask = _packed(position_ids)
    tables = rope.at(positions, device, dtype)
    token_step = is_token_step(hidden, cached=cache is not None)
    return AttentionContext(
        tables, mask, total, cache, token_step and all(map(is_plain_field, fields))
    )


def _real_tokens(
    attention_mask: Tensor | None, record: CacheRecord | None, *, batch: int, past: int, time: int
) -> Tensor | None:
    """Return (batch, past + time) bool, false for padding; None where no token is padding."""
    held = None
    if past and record is not None and record.attention_mask is not None:
        held = record.attention_mask[:, :past]
    if attention_mask is None:
        if held is None:
            return None
        if len(held) != batch:
            raise ValueError(
                f"the cache was filled with padding in {len(held)} rows, this pass has {batch} "
                "rows; pass their attention_mask"
            )
        return torch.cat([held, held.new_ones(batch, time)], 1)
    if tuple(attention_mask.shape) != (batch, past + time):
        raise ValueError(
            f"attention_mask must be (batch, cached + new tokens), here {(batch, past + time)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    if held is None and bool(attention_mask.all()):
        return None
    real = attention_mask.bool()
    if past:
        _check_agreement(real[:, :past], held)
    return real


def _check_agreement(real: Tensor, held: Tensor | None) -> None:
    """Refuse a mask over held tokens, (batch, held), that is not the one they were computed with.

    Tokens at a row's end may be hidden later: no earlier token attended to them, and no position
    changes.
    """
    if held is not None and (len(held) != len(real) or torch.equal(real, held)):
        return  # Rows that were repeated since cannot be compared.
    expected = real.flip(-1).cumsum(-1).flip(-1) > 0
    if held is not None:
        expected &= held
    if not torch.equal(real, expected):
        raise ValueError(
            "attention_mask marks other cached tokens as padding than the pass that cached them "
            "did, so their positions and contents would be wrong; use the same mask from the first "
            "pass on"
        )


def _check_positions(position_ids: Tensor, *, batch: int, time: int, num_positions: int) -> None:
    if position_ids.dim() != 2 or position_ids.shape not in ((batch, time), (1, time)):
        raise ValueError(
            f"position_ids must be (batch, new tokens), here {(batch, time)}, "
            f"got {tuple(position_ids.shape)}"
        )
    first, last = torch.stack(position_ids.aminmax()).tolist()
    if first < 0 or last >= num_positions:
        raise ValueError(
            f"position_ids must lie between 0 and {num_positions - 1} (context_length - 1), "
            f"got {first} to {last}"
        )


def _packed(position_ids: Tensor) -> Tensor | None:
    """Return the mask of sequences that stand one after the other in a row; None if there is one.

    Args:
        position_ids: (batch or 1, time).

    Returns:
        (batch or 1, 1, time, time) bool.
    """
    starts = position_ids.diff(dim=-1) != 1
    if not bool(starts.any()):
        return None
    sequence = torch.cat([starts.new_zeros(len(starts), 1), starts], 1).cumsum(-1)
    same = sequence[:, None, :, None] == sequence[:, None, None, :]
    return same & _causal(0, position_ids.size(1), position_ids.device)


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
