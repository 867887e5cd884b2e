"""Two simple language models, counted from the training text, that choose test items.

Neither takes part in a measurement.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

PAIR_SHARE = 0.7
"""Weight of bigrams in a phrase's likelihood; the rest is the weight of single tokens."""
PRESENT_WORD_BONUS = 0.1
"""Bonus of a word that is in the passage and was seen after its last word in training text."""

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation and numbers."""
    return [word.lower() for word in _WORD.findall(text)]


class WordTrigrams:
    """Word trigrams of the training text: which words its reader could expect after a passage."""

    def __init__(self, text: str) -> None:
        words = words_of(text)
        self._singles = Counter(words)
        self._pairs = Counter(pairwise(words))
        self._triples = Counter(zip(words, words[1:], words[2:], strict=False))

    def expectation(self, before: Sequence[str], word: str) -> float:
        """Return how predictable a word is after at least two others, from 0 to about 1.

        All words are in lower case.
        """
        first, second = before[-2:]
        num_pairs = self._pairs[second, word]
        pair_share = num_pairs / (self._singles[second] + 2)
        triple_share = self._triples[first, second, word] / (self._pairs[first, second] + 1)
        bonus = PRESENT_WORD_BONUS if num_pairs and word in before else 0.0
        return (pair_share + triple_share) / 2 + bonus


class TokenBigrams:
    """Token bigrams of the training text: which endings are equally likely without the passage."""

    def __init__(self, tokens: np.ndarray, vocab_size: int) -> None:
        wide = tokens.astype(np.int64)
        self._vocab_size = vocab_size
        self._singles = np.bincount(wide, minlength=vocab_size) + 0.5
        self._pairs = Counter((wide[:-1] * vocab_size + wide[1:]).tolist())
        self._total = float(self._singles.sum())

    def log_likelihood(self, tokens: Sequence[int]) -> float:
        """Return the log-likelihood of a phrase, in nats; at least one token."""
        total = math.log(self._singles[tokens[0]] / self._total)
        for before, token in pairwise(tokens):
            pair = self._pairs[before * self._vocab_size + token] / self._singles[before]
            single = self._singles[token] / self._total
            total += math.log(PAIR_SHARE * pair + (1 - PAIR_SHARE) * single)
        return total
