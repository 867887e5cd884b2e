"""Keys and values per evaluation slot, preallocated, so that decoding a token copies nothing of the
past.

Correction i of a new token must attend to what correction i of earlier tokens attended from; then
cached decoding equals the full forward. So each evaluation has its own slot: the prediction of
layer l is slot l, corrections follow from slot L on, layer by layer. With that numbering the first
L slots are those of a plain decoder. Under another schedule the same slot means another evaluation,
so a cache records its evaluations per layer, and a pass that makes others is refused.

The strategy `last` keeps one slot per layer, in which each evaluation overwrites the one before: a
quarter of the memory at three corrections, and no longer exact. It is what the published decoding
aimed at.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.context import CacheRecord, set_record

__all__ = ["KeyValueCache", "KvStrategy", "evaluation_slots"]

KvStrategy = Literal["exact", "last"]


@lru_cache(maxsize=64)
def evaluation_slots(evaluations_per_layer: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Number the evaluations: per layer, the slot of each.

    Args:
        evaluations_per_layer: at least 1 each.
    """
    slots: list[tuple[int, ...]] = []
    following = len(evaluations_per_layer)
    for layer, count in enumerate(evaluations_per_layer):
        slots.append((layer, *range(following, following + count - 1)))
        following += count - 1
    return tuple(slots)


class KeyValueCache:
    """Room for the keys and values of `max_tokens` tokens.

    Args:
        config: sizes, method and iteration schedule; passes under another one are refused.
        batch_size: sequences decoded together.
        max_tokens: prompt and continuation together.
        device: where the decoder is.
        dtype: of keys and values.
        strategy: `exact`, a slot per evaluation, or `last`, a slot per layer.

    Raises:
        ValueError: unknown strategy; from `update`, no room; from `get_seq_length`, slots of
        different lengths.
    """

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
        if strategy not in ("exact", "last"):
            raise ValueError(f"KV strategy must be 'exact' or 'last', got {strategy!r}")
        evaluations_per_layer = config.evaluations_per_layer()
        set_record(self, CacheRecord(evaluations_per_layer))
        slots = evaluation_slots(evaluations_per_layer)
        num_slots = sum(map(len, slots))
        self.max_tokens = max_tokens
        self.strategy = strategy
        self._lengths = [0] * num_slots
        self._rows = list(range(num_slots))
        if strategy == "last":
            for layer, of_layer in enumerate(slots):
                for slot in of_layer:
                    self._rows[slot] = layer
        num_rows = max(self._rows) + 1
        shape = (num_rows, 2, batch_size, config.num_kv_heads, max_tokens, config.head_dim)
        storage = torch.empty(shape, device=device, dtype=dtype)
        self._keys = [storage[row, 0] for row in self._rows]
        self._values = [storage[row, 1] for row in self._rows]
        self.num_bytes = storage.nbytes

    def get_seq_length(self) -> int:
        """Return the number of tokens held.

        Raises:
            ValueError: a pass was interrupted, so that some slots hold its tokens and others do
                not.
        """
        if min(self._lengths) != max(self._lengths):
            raise ValueError(
                f"the cache's slots hold from {min(self._lengths)} to {max(self._lengths)} tokens, "
                "since a pass through it was interrupted; make a new cache"
            )
        return self._lengths[0]

    def update(self, keys: Tensor, values: Tensor, slot: int, /) -> tuple[Tensor, Tensor]:
        """Write keys and values, (batch, kv_heads, new, head_dim), behind those of a slot.

        Returns:
            Views of all keys and values of the slot, (batch, kv_heads, held, head_dim).

        Raises:
            ValueError: no room.
        """
        start = self._lengths[slot]
        end = start + keys.size(2)
        if end > self.max_tokens:
            raise ValueError(
                f"the cache has room for max_tokens={self.max_tokens}, got {end} tokens"
            )
        all_keys, all_values = self._keys[slot], self._values[slot]
        all_keys.narrow(2, start, keys.size(2)).copy_(keys)
        all_values.narrow(2, start, keys.size(2)).copy_(values)
        self._lengths[slot] = end
        return all_keys.narrow(2, 0, end), all_values.narrow(2, 0, end)
