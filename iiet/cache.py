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

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.methods import METHODS

__all__ = [
    "CacheRecord",
    "DecodingCache",
    "KeyValueCache",
    "KvStrategy",
    "agreed_record",
    "evaluation_slots",
    "get_record",
    "set_record",
]

KvStrategy = Literal["exact", "last"]


class DecodingCache(Protocol):
    """What a decoder asks of a cache; `KeyValueCache` and the caches of transformers satisfy it."""

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        ...

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, /
    ) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim) to a slot and return all its keys and values."""
        ...


@dataclass
class CacheRecord:
    """What later passes through a cache must agree with."""

    evaluations_per_layer: tuple[int, ...]
    """Evaluations of each layer that the slots were made for or filled by."""
    attention_mask: Tensor | None = None
    """(batch, held) bool, false for padding among the tokens held; None where there is none."""


def agreed_record(cache: DecodingCache, evaluations_per_layer: tuple[int, ...]) -> CacheRecord:
    """Return a cache's record. A cache without one, such as those of transformers, gets it here.

    Args:
        cache: about to be used by a pass.
        evaluations_per_layer: what that pass makes.

    Raises:
        ValueError: the cache was made for or filled by other evaluations.
    """
    record = get_record(cache)
    if record is None:
        record = CacheRecord(evaluations_per_layer)
        set_record(cache, record)
    if record.evaluations_per_layer != evaluations_per_layer:
        there, here = (
            ",".join(map(str, counts))
            for counts in (record.evaluations_per_layer, evaluations_per_layer)
        )
        raise ValueError(
            f"the cache is for {there} evaluations per layer, this pass makes {here}; decode with "
            "the iteration schedule that the cache was made for, or make a new cache"
        )
    return record


def get_record(cache: DecodingCache) -> CacheRecord | None:
    """Return a cache's record; None where a cache of another class has served no pass yet."""
    record: CacheRecord | None = getattr(cache, _RECORD, None)
    return record


def set_record(cache: DecodingCache, record: CacheRecord | None) -> None:
    """Attach a record to a cache of any class; None forgets it."""
    setattr(cache, _RECORD, record)


_RECORD = "iiet_record"
"""Attribute of a cache that holds its record; it stays with copies of the cache."""


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
        method = METHODS[config.method]
        evaluations_per_layer = tuple(
            method.evaluations_per_layer(config.corrections, layer)
            for layer in range(config.num_layers)
        )
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
