"""Key/value cache: one preallocated slot per field evaluation; decoding copies no earlier tokens.

Correction i of a new token must attend to correction i of earlier tokens; then cached decoding
equals the full forward. So the prediction of layer l has slot l, and corrections follow from slot L
on, layer by layer. Another schedule numbers the slots differently: a cache records its evaluations
per layer, and a pass under another schedule is refused. A schedule with fewer corrections can use a
view of the cache: the slots of the evaluations that it makes, in the same memory.

The strategy `last` keeps one slot per layer, which each evaluation overwrites: a quarter of the
memory at three corrections, but not exact. The published decoding does this.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

from iiet.model.config import ModelConfig

__all__ = ["KeyValueCache", "KvStrategy", "Window", "check_kv_strategy", "evaluation_slots"]

KvStrategy = Literal["exact", "last"]


def check_kv_strategy(strategy: str) -> None:
    if strategy not in ("exact", "last"):
        raise ValueError(f"KV strategy must be 'exact' or 'last', got {strategy!r}")


def evaluation_slots(evaluations_per_layer: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Number the evaluations: for each layer, the slots of its evaluations."""
    slots: list[tuple[int, ...]] = []
    following = len(evaluations_per_layer)
    for layer, count in enumerate(evaluations_per_layer):
        slots.append((layer, *range(following, following + count - 1)))
        following += count - 1
    return tuple(slots)


class Window:
    """Where a decoding step of fixed shapes writes into a cache, and which tokens it sees.

    What changes from token to token is a value on the device, never a number in Python, so all
    steps run the same kernels with the same arguments, and a CUDA graph can replay them. Attention
    reads a fixed number of the cache's tokens; a mask hides the unused ones. The mask is added to
    the scores: PyTorch would make such a mask of a boolean one in every call. cuDNN's kernel (half
    precision) and the memory-efficient kernel accept it. The flash kernel accepts no mask; its form
    for lengths on the device has no padding on the left, no float32, and no CPU version.

    `dtype` is that of the queries.
    """

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

    def mask_within(self, num_tokens: int) -> Tensor:
        """Return what `mask` returns, with tokens hidden that are not among the last `num_tokens`,
        the step's own included."""
        columns = torch.arange(self.size, device=self.columns.device)
        return self.mask().masked_fill(columns <= self.columns - num_tokens, -torch.inf)

    def advance(self) -> None:
        """Set the window after one more token."""
        self.columns.add_(1)

    def write(self, held: Tensor, new: Tensor) -> None:
        """Put keys or values of the step's token, (batch, heads, 1, head_dim), into the cache's."""
        held.index_copy_(2, self.columns, new)


class KeyValueCache:
    """Keys and values of at most `max_tokens` tokens, prompt and continuation together."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        max_tokens: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        strategy: KvStrategy = "exact",
    ) -> None:
        check_kv_strategy(strategy)
        self.evaluations_per_layer = evaluations_per_layer = config.evaluations_per_layer()
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.dtype = dtype
        self.strategy = strategy
        # By slot: the row of the storage that holds its keys and values.
        rows = list(range(sum(evaluations_per_layer)))
        if strategy == "last":
            for layer, slots in enumerate(evaluation_slots(evaluations_per_layer)):
                for slot in slots:
                    rows[slot] = layer
        shape = (batch_size, 2 * config.num_kv_heads, max_tokens, config.head_dim)
        # Keys, then values, in one tensor: a step appends both at once.
        storage = [torch.empty(shape, device=device, dtype=dtype) for _ in range(max(rows) + 1)]
        self._slots = [storage[row] for row in rows]
        self._keys = [held.narrow(1, 0, config.num_kv_heads) for held in self._slots]
        self._values = [
            held.narrow(1, config.num_kv_heads, config.num_kv_heads) for held in self._slots
        ]
        self._lengths = [0] * len(rows)
        self.num_bytes = sum(held.nbytes for held in storage)
        self.attention_mask: Tensor | None = None
        """(batch, held) bool, false for padding among the tokens held; None where there is none."""
        self.window: Window | None = None
        """Where a pass writes and looks; None: passes follow the tokens held."""

    def view(self, config: ModelConfig) -> KeyValueCache:
        """Return a cache in the same memory for a schedule with no more corrections in any layer.

        It holds the same tokens. Its passes write keys and values of their evaluations over those
        of this cache, and its length changes by itself.

        Raises:
            ValueError: a layer makes more evaluations, or has other heads.
        """
        counts = config.evaluations_per_layer()
        held_counts = self.evaluations_per_layer
        num_heads = self._keys[0].size(1)
        is_within = len(counts) == len(held_counts) and all(map(int.__le__, counts, held_counts))
        if not is_within or config.num_kv_heads != num_heads:
            raise ValueError(
                f"a view is for at most {','.join(map(str, held_counts))} evaluations per layer "
                f"and {num_heads} key/value heads, got {','.join(map(str, counts))} and "
                f"{config.num_kv_heads}"
            )
        # By slot of the view: the slot of this cache. Of each layer, the first ones are taken.
        slots = [0] * sum(counts)
        view_slots = evaluation_slots(counts)
        held_slots = evaluation_slots(held_counts)
        for slots_of_view, slots_here in zip(view_slots, held_slots, strict=True):
            for slot_of_view, slot_here in zip(slots_of_view, slots_here, strict=False):
                slots[slot_of_view] = slot_here
        view = copy.copy(self)
        view.evaluations_per_layer = counts
        view._slots = [self._slots[slot] for slot in slots]
        view._keys = [self._keys[slot] for slot in slots]
        view._values = [self._values[slot] for slot in slots]
        view._lengths = [self.get_seq_length()] * len(slots)
        view.num_bytes = 0
        return view

    def get_seq_length(self) -> int:
        """Return the number of tokens held.

        Raises:
            ValueError: a pass through the cache was interrupted.
        """
        if min(self._lengths) != max(self._lengths):
            raise ValueError(
                f"the cache's slots hold from {min(self._lengths)} to {max(self._lengths)} tokens, "
                "since a pass through it was interrupted; make a new cache"
            )
        return self._lengths[0]

    def set_length(self, length: int) -> None:
        """Count the first `length` tokens as held: later ones are forgotten, written ones kept."""
        self._lengths = [length] * len(self._lengths)

    def clear(self) -> None:
        """Forget all tokens, which of them were padding, and the window."""
        self.set_length(0)
        self.window = self.attention_mask = None

    def zero_unused(self) -> None:
        """Overwrite what is not held with zeros, for passes that read all of the cache."""
        length = self.get_seq_length()
        for held in dict.fromkeys(self._slots):
            held.narrow(2, length, self.max_tokens - length).zero_()

    def update(self, keys: Tensor, values: Tensor, slot: int, /) -> tuple[Tensor, Tensor]:
        """Append keys and values, (batch, kv_heads, new, head_dim), to those of a slot.

        Returns views of all of the slot's, (batch, kv_heads, held, head_dim). More than
        `max_tokens` tokens are a ValueError.
        """
        return self._write(slot, (self._keys[slot], keys), (self._values[slot], values))

    def append(self, heads: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Do `update` with keys and values as one tensor, (batch, 2 kv_heads, new, head_dim)."""
        return self._write(slot, (self._slots[slot], heads))

    def _write(self, slot: int, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self.window is not None:
            for held, new in pairs:
                self.window.write(held, new)
            end = self.window.size
        else:
            start = self._lengths[slot]
            num_new = pairs[0][1].size(2)
            end = start + num_new
            if end > self.max_tokens:
                raise ValueError(
                    f"the cache has room for max_tokens={self.max_tokens}, got {end} tokens"
                )
            for held, new in pairs:
                # Autocast lets attention read what the cache rounds, or not, to another dtype.
                if new.dtype != held.dtype and not torch.is_autocast_enabled(new.device.type):
                    raise ValueError(
                        f"the cache holds {held.dtype}, and the model's keys are {new.dtype}; make "
                        f"the cache with dtype={new.dtype}"
                    )
                # `narrow` is faster than indexing, which counts in a decoding step.
                held.narrow(2, start, num_new).copy_(new)
            self._lengths[slot] = end
        return self._keys[slot].narrow(2, 0, end), self._values[slot].narrow(2, 0, end)
