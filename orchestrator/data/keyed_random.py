"""Random numbers and permutations that are computed from a key, not drawn from a generator.

Element number n needs no element before it, so a position is all that a resumed run has to know.
The results do not depend on the version of a library.
"""

from __future__ import annotations

import numpy as np

_FEISTEL_ROUNDS = 6
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ODD = 0xD1B54A32D192ED03


def random_bits(key: int, positions: np.ndarray, num: int) -> np.ndarray:
    """Return `num` random numbers for each of n positions, uint64, (n, num).

    The numbers of a position depend on nothing but the key and that position.
    """
    with np.errstate(over="ignore"):  # The sums are modulo 2^64.
        starts = mix_array(positions.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(mix(key)))
        steps = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(_ODD)
        return mix_array(starts[:, None] + steps)


def uniform_below(bits: np.ndarray, limit: int) -> np.ndarray:
    """Map random uint64 to integers from 0 to `limit` - 1, int64; `limit` is at most 2^32."""
    return ((bits >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)).astype(np.int64)


def permute(values: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return the images of `values`, int64, under the permutation of range(size) of a `key`."""
    # A Feistel network over the next power of four; images outside the range are permuted again.
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = [np.uint64(mix(key + number)) for number in range(1, _FEISTEL_ROUNDS + 1)]
    images = values.astype(np.uint64)
    outside = np.ones(images.shape, dtype=bool)
    while outside.any():
        left, right = images[outside] >> np.uint64(half), images[outside] & low
        for round_key in keys:
            left, right = right, left ^ (mix_array(right ^ round_key) & low)
        images[outside] = left << np.uint64(half) | right
        outside = images >= np.uint64(size)
    return images.astype(np.int64)


def mix(value: int) -> int:
    """Return a hash of 64 bits: every bit of `value` changes about half of it (splitmix64)."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def mix_array(values: np.ndarray) -> np.ndarray:
    """Return `mix` of each value, uint64."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ values >> np.uint64(31)
    return mixed
