"""Key/value cache: one preallocated slot per field evaluation; decoding copies no earlier tokens.

Correction i of a new token must attend to correction i of earlier tokens; then cached decoding
equals the full forward. So the prediction of layer l has slot l, and corrections follow from slot L
on, layer by layer. Another schedule numbers the slots differently: a cache records its evaluations
per layer, and a pass under another schedule is refused.

The strategy `last` keeps one slot per layer, which each evaluation overwrites: a quarter of the
memory at three corrections, but not exact. The published decoding does this.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.context import CacheRecord, set_record

__all__ = ["KeyValueCache", "KvStrategy", "check_kv_strategy", "evaluation_slots"]

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
        evaluations_per_layer = config.evaluations_per_layer()
        set_record(self, CacheRecord(evaluations_per_layer))
        self.max_tokens = max_tokens
        self.strategy = strategy
        # By slot: the row of the storage that holds its keys and values.
        rows = list(range(sum(evaluations_per_layer)))
        if strategy == "last":
            for layer, slots in enumerate(evaluation_slots(evaluations_per_layer)):
                for slot in slots:
                    rows[slot] = layer
        shape = (max(rows) + 1, 2, batch_size, config.num_kv_heads, max_tokens, config.head_dim)
        storage = torch.empty(shape, device=device, dtype=dtype)
        self._keys = [storage[row, 0] for row in rows]
        self._values = [storage[row, 1] for row in rows]
        self._lengths = [0] * len(rows)
        self.num_bytes = storage.nbytes

    def get_seq_length(self) -> int:
        """Return the number of tokens held; a ValueError after an interrupted pass."""
        if min(self._lengths) != max(self._lengths):
            raise ValueError(
                f"the cache's slots hold from {min(self._lengths)} to {max(self._lengths)} tokens, "
                "since a pass through it was interrupted; make a new cache"
            )
        return self._lengths[0]

    def update(self, keys: Tensor, values: Tensor, slot: int, /) -> tuple[Tensor, Tensor]:
        """Append keys and values, (batch, kv_heads, new, head_dim), to those of a slot.

        Returns views of all of the slot's, (batch, kv_heads, held, head_dim). More than
        `max_tokens` tokens are a ValueError.
        """
        start = self._lengths[slot]
        end = start + keys.size(2)
        if end > self.max_tokens:
            raise ValueError(
                f"the cache has room for max_tokens={self.max_tokens}, got {end} tokens"
            )
        all_keys, all_values = self._keys[slot], self._values[slot]
        # `narrow` is faster than indexing, which counts in a decoding step.
        all_keys.narrow(2, start, end - start).copy_(keys)
        all_values.narrow(2, start, end - start).copy_(values)
        self._lengths[slot] = end
        return all_keys.narrow(2, 0, end), all_values.narrow(2, 0, end)
