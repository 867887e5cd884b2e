"""Positions and mask of one forward pass.

Neither depends on layer or correction, so both are computed once per pass, and all evaluations
share them (`iiet.model.layers.PassContext`). Positions do not count padding. A cache remembers its
padding, so later passes need no mask, and a mask that contradicts the cache is refused. Most passes
need no mask at all: the kernel has a causal one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from iiet.model.cache import KeyValueCache
from iiet.model.layers import Block, PassContext, Rope, StepWeights

__all__ = ["make_context"]


def make_context(
    hidden: Tensor,
    rope: Rope,
    *,
    step_weights: Mapping[Block, StepWeights] | None = None,
    windows: Iterable[int] = (),
    cache: KeyValueCache | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> PassContext:
    """Compute positions and mask of a pass over `hidden`, (batch, time, dim).

    Mask, positions and errors are those of `Decoder.forward`.

    Args:
        hidden: the embeddings.
        rope: rotary embedding of the model, which knows how long its context is.
        step_weights: see `PassContext`.
        windows: the sliding windows of the layers, in tokens.
        cache: keys and values of earlier tokens; what it knows of padding is read and updated.
        attention_mask: None: only the padding that the cache remembers counts.
        position_ids: None: positions count all tokens but padding.
    """
    if cache is not None and cache.window is not None:
        window = cache.window
        assert hidden.size(1) == window.columns.size(-1), "a pass has as many tokens as its window"
        return PassContext(
            rope=rope.at(window.positions(), hidden.device, hidden.dtype),
            mask=window.mask(),
            is_causal=False,
            cache=cache,
            step_weights=step_weights,
            window_masks={size: window.mask_within(size) for size in windows if size < window.size},
        )
    batch, time = hidden.shape[:2]
    device = hidden.device
    past = 0 if cache is None else cache.get_seq_length()
    total = past + time
    if position_ids is None and total > rope.num_positions:
        raise ValueError(
            f"{total} tokens do not fit a context_length of {rope.num_positions}; "
            "shorten the input, or train with a longer context: later positions were never seen"
        )

    # A mask of three axes says which tokens each sees; one of two axes, which are padding.
    visible = None
    if attention_mask is not None and attention_mask.dim() == 3:
        visible = attention_mask
        attention_mask = None
        _check_visible(visible, hidden, is_positioned=position_ids is not None and cache is None)
    held = None if cache is None or not past else cache.attention_mask
    real = _real_tokens(attention_mask, held, batch=batch, past=past, time=time)
    if cache is not None:
        cache.attention_mask = real

    if position_ids is not None:
        _check_positions(position_ids, batch=batch, time=time, num_positions=rope.num_positions)
        positions = position_ids
    elif real is not None:
        positions = (real.cumsum(-1) - 1).clamp_min(0)[:, past:]
    else:
        positions = torch.arange(past, total, device=device)

    mask: Tensor | None = None
    if visible is not None:
        mask = visible[:, None]
    elif real is not None:
        mask = _causal(past, total, device, real)
    elif past and time > 1:
        mask = _continuing(past, total, device)
    elif position_ids is not None and cache is None:
        mask = _packed(position_ids)

    window_masks: dict[int, Tensor | None] = {}
    for size in windows:
        if size >= total:
            continue  # Such a layer sees all that others see.
        if time == 1 and mask is None:
            window_masks[size] = None
            continue
        whole = mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else None
        if whole is None:
            whole = _causal(past, total, device)
        # A mask of queries and keys orders tokens by their positions, all others by their columns.
        places = torch.arange(total, device=device) if visible is None else position_ids
        assert places is not None
        whole = whole & _near(places, size, num_queries=time)
        window_masks[size] = whole[..., max(0, total - tokens_in_reach(size, time)) :]
    return PassContext(
        rope=rope.at(positions, device, hidden.dtype),
        mask=mask,
        is_causal=mask is None and time > 1,
        cache=cache,
        step_weights=step_weights,
        window_masks=window_masks,
    )


def tokens_in_reach(window: int, time: int) -> int:
    """Return how many of the latest tokens a pass over `time` tokens reads through a window."""
    return window + time - 1


def _near(places: Tensor, window: int, *, num_queries: int) -> Tensor:
    """Return which tokens lie within the window of each of the last ones, (batch or 1, 1,
    num_queries, total). `places`, (batch or 1, total) or (total,), orders the tokens."""
    places = places.reshape(-1, 1, places.size(-1))
    queries = places[..., -num_queries:]
    return queries[..., :, None] - places[..., None, :] < window


def _check_visible(visible: Tensor, hidden: Tensor, *, is_positioned: bool) -> None:
    batch, time = hidden.shape[:2]
    if not is_positioned or visible.shape != (batch, time, time):
        raise ValueError(
            f"an attention_mask of queries and keys must be (batch, time, time), with "
            f"position_ids and without a cache; got {tuple(visible.shape)}"
        )


def _real_tokens(
    attention_mask: Tensor | None, held: Tensor | None, *, batch: int, past: int, time: int
) -> Tensor | None:
    """Return (batch, past + time) bool, false for padding; None where no token is padding."""
    if held is not None:
        held = held[:, :past]
        # Steps of fixed shapes do not extend the mask; their tokens are no padding.
        held = F.pad(held, (0, past - held.size(1)), value=True)
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
    if held is None and _is_true(attention_mask.all(), if_unknown=False):
        return None
    real = attention_mask.bool()
    if past:
        _check_agreement(real[:, :past], held)
    return real


def _check_agreement(real: Tensor, held: Tensor | None) -> None:
    """Refuse a mask of cached tokens, (batch, held), that differs from that of their own pass."""
    if held is not None and len(held) != len(real):
        return  # The rows were repeated since, so they cannot be compared.
    # Hiding a row's last tokens later is fine: no earlier token saw them, no position changes.
    expected = real.flip(-1).cumsum(-1).flip(-1) > 0
    if held is not None:
        expected &= held
    if not _is_true((real == expected).all(), if_unknown=True):
        raise ValueError(
            "attention_mask marks other cached tokens as padding than the pass that cached them "
            "did, so their positions and contents would be wrong; use the same mask from the first "
            "pass on"
        )


def _check_positions(position_ids: Tensor, *, batch: int, time: int, num_positions: int) -> None:
    if position_ids.shape not in ((batch, time), (1, time)):
        raise ValueError(
            f"position_ids must be (batch, new tokens), here {(batch, time)}, "
            f"got {tuple(position_ids.shape)}"
        )
    first, last = position_ids.aminmax()
    if not _is_true((first >= 0) & (last < num_positions), if_unknown=True):
        raise ValueError(
            f"position_ids must lie between 0 and {num_positions - 1} (context_length - 1), "
            f"got {int(first)} to {int(last)}"
        )


def _is_true(fact: Tensor, *, if_unknown: bool) -> bool:
    """Read one boolean. While a graph is compiled there is no value: `if_unknown` then skips a
    check, or keeps a mask that may not be needed.
    """
    return if_unknown if torch.compiler.is_compiling() else bool(fact)


def _packed(position_ids: Tensor) -> Tensor | None:
    """Return the mask, (batch or 1, 1, time, time), of rows that hold several sequences, or None.

    A sequence starts where positions, (batch or 1, time), do not increase by one.
    """
    starts = position_ids.diff(dim=-1) != 1
    if not _is_true(starts.any(), if_unknown=True):
        return None
    sequence = torch.cat([starts.new_zeros(len(starts), 1), starts], 1).cumsum(-1)
    same = sequence[:, None, :, None] == sequence[:, None, None, :]
    return same & _causal(0, position_ids.size(1), position_ids.device)


def _continuing(past: int, total: int, device: torch.device) -> Tensor:
    """Return the mask of tokens that continue a cache without padding."""
    # A GPU's fused kernels accept PyTorch's own object for this mask, but no array of booleans. On
    # a CPU the object would be turned into such an array, and importing it costs a second.
    if device.type == "cpu" or torch.compiler.is_compiling():
        return _causal(past, total, device)
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(total - past, total)


def _causal(past: int, total: int, device: torch.device, real: Tensor | None = None) -> Tensor:
    """Return which of `total` tokens each of the last `total - past` may see, (batch or 1, 1,
    total - past, total). `real`, (batch, total), is false for padding.
    """
    keys = torch.arange(total, device=device)
    queries = keys[past:, None]
    if real is None:
        return (keys <= queries)[None, None]
    # Padding sees only itself, because a softmax needs at least one token.
    return ((keys < queries) & real[:, None, None, :]) | (keys == queries)
