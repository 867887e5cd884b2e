"""Choose test items from held-out documents; the same documents always give the same items.

Passages are unchanged slices that begin with a sentence. The wrong endings of a passage are the
right ones of other passages, with similar length and probability. So an ending alone does not
reveal whether it is right: a model that ignores the passage gets one in four.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from orchestrator.data.prose import GRAMMAR_WORDS, plain_word_fraction
from orchestrator.data.text import Document
from orchestrator.evaluation.heldout.ngrams import TokenBigrams, WordTrigrams, words_of
from orchestrator.evaluation.heldout.sentence_splitting import (
    MIN_PLAIN_SHARE,
    cut_position,
    find_sentences,
    is_plain,
)

Item = TypeVar("Item")

NUM_CHOICES = 4
MIN_CONTEXT_WORDS = 8

MIN_WORDS_BEFORE = 3
MIN_EXPECTATION = 0.15
MIN_GRAMMAR_WORD_EXPECTATION = 0.25
FALLBACK_EXPECTATION = 0.05
MAX_LAST_WORD_TOKENS = 2
LAST_WORDS_PER_SENTENCE = 2
MAX_SAME_WORD_SHARE = 0.02
EXCLUDED_WORDS = frozenset(["a", "an", "the"])

ENDINGS_PER_LENGTH_GROUP = 128
RING_SIZE = 8
MAX_COMMON_WORDS = 0.5

_ASKED_WORD = re.compile(r"(?<= )([a-z]{2,})(?=[.,;:!?]?(?: |$))")


@dataclass(frozen=True)
class LastWordItem:
    """A passage without its last word (as in LAMBADA), which a reader could expect."""

    context: str
    word: str
    source: str


@dataclass(frozen=True)
class ContinuationItem:
    """A passage that stops within a sentence, four endings (as in HellaSwag), and the right one."""

    context: str
    endings: tuple[str, ...]
    label: int
    source: str


@dataclass(frozen=True)
class _Cut:
    document: int
    context: str
    ending: str
    log_likelihood: float
    """Log-likelihood of the ending without the passage, in nats."""


class ItemBuilder:
    """Cuts items out of held-out documents.

    Args:
        words: Word statistics of the training text.
        tokens: Token statistics of the training text.
        max_tokens: Length limit of a passage with its ending.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        words: WordTrigrams,
        tokens: TokenBigrams,
        encode: Callable[[str], list[int]],
        max_tokens: int,
    ) -> None:
        self.documents = documents
        self._words = words
        self._tokens = tokens
        self._encode = encode
        self._num_tokens = lru_cache(maxsize=1 << 16)(lambda text: len(encode(text)))
        self._max_tokens = max_tokens
        self._sentences = [list(find_sentences(document.text)) for document in documents]
        self._sizes = [
            [self._num_tokens(document.text[span]) + 1 for span in sentences]
            for document, sentences in zip(documents, self._sentences, strict=True)
        ]

    def last_words(self, limit: int) -> list[LastWordItem]:
        """Return at most `limit` items, those with the most predictable words first."""
        predictable: list[LastWordItem] = []
        others: list[LastWordItem] = []
        for document, index, text in self._plain_sentences():
            found = list(self._last_words(document, index, text))
            found = _in_hash_order(found, lambda pair: pair[0].context)
            chosen = [item for item, is_predictable in found if is_predictable]
            predictable += chosen[:LAST_WORDS_PER_SENTENCE]
            others += [item for item, _ in found if not chosen][:1]
        return _spread_over_words([*_distinct(predictable), *_distinct(others)], limit)

    def continuations(self, limit: int) -> list[ContinuationItem]:
        """Return at most `limit` items, chosen by hash."""
        found: dict[str, _Cut] = {}
        for document, index, text in self._plain_sentences():
            position = cut_position(text)
            if position is None:
                continue
            ending = text[position + 1 :]
            context = self._passage(document, index, text[:position], f" {ending}")
            if context is not None:
                log_likelihood = self._tokens.log_likelihood(self._encode(f" {ending}"))
                found.setdefault(ending.lower(), _Cut(document, context, ending, log_likelihood))
        cuts = _in_hash_order(found.values(), lambda cut: cut.context + cut.ending)[:limit]
        items = [item for ring in _rings(cuts) for item in self._items_of(ring)]
        return _in_hash_order(items, lambda item: item.context)

    def _plain_sentences(self) -> Iterator[tuple[int, int, str]]:
        """Yield the document's index, the sentence's index in it, and the text."""
        for document, sentences in enumerate(self._sentences):
            for index, sentence in enumerate(sentences):
                text = self.documents[document].text[sentence]
                if is_plain(text):
                    yield document, index, text

    def _last_words(
        self, document: int, index: int, text: str
    ) -> Iterator[tuple[LastWordItem, bool]]:
        """Yield the items of a sentence, each with whether its word is predictable."""
        for match in _ASKED_WORD.finditer(text):
            word, head = match[1], text[: match.start() - 1]
            before = words_of(head)
            if len(before) < MIN_WORDS_BEFORE or word in EXCLUDED_WORDS:
                continue
            is_known = self._words.expectation(before, word) > 0
            if not is_known or self._num_tokens(f" {word}") > MAX_LAST_WORD_TOKENS:
                continue
            context = self._passage(document, index, head, f" {word}")
            if context is None:
                continue
            expectation = self._words.expectation(words_of(context), word)
            is_grammar = word in GRAMMAR_WORDS
            enough = MIN_GRAMMAR_WORD_EXPECTATION if is_grammar else MIN_EXPECTATION
            if expectation >= enough or (expectation >= FALLBACK_EXPECTATION and not is_grammar):
                item = LastWordItem(context, word, self.documents[document].source)
                yield item, expectation >= enough

    def _passage(self, document: int, index: int, head: str, ending: str) -> str | None:
        """Return `head` after as many sentences as fit; None if the result is no usable passage."""
        size = self._num_tokens(head + ending)
        first = index
        while first > 0 and size + self._sizes[document][first - 1] <= self._max_tokens:
            first -= 1
            size += self._sizes[document][first]
        text = self.documents[document].text
        starts = [sentence.start for sentence in self._sentences[document]]
        context = text[starts[first] : starts[index]] + head
        fits = self._num_tokens(context + ending) <= self._max_tokens
        is_long = len(context.split()) >= MIN_CONTEXT_WORDS
        is_prose = plain_word_fraction(context) >= MIN_PLAIN_SHARE
        return context if fits and is_long and is_prose else None

    def _items_of(self, ring: list[_Cut]) -> Iterator[ContinuationItem]:
        for position, cut in enumerate(ring):
            others = [ring[(position + i) % len(ring)] for i in range(1, NUM_CHOICES)]
            endings = [cut.ending, *(other.ending for other in others)]
            # Not the hash that chose the cuts: with it, right answers would come first.
            order = sorted(range(NUM_CHOICES), key=lambda i: _hash(endings[i] + cut.context))
            yield ContinuationItem(
                context=cut.context,
                endings=tuple(endings[i] for i in order),
                label=order.index(0),
                source=self.documents[cut.document].source,
            )


def _rings(cuts: list[_Cut]) -> Iterator[list[_Cut]]:
    """Yield rings of similar endings; the next three in a ring are the wrong answers of one."""
    by_length = sorted(cuts, key=lambda cut: (len(cut.ending), cut.ending))
    waiting: list[_Cut] = []
    for first in range(0, len(by_length), ENDINGS_PER_LENGTH_GROUP):
        waiting += by_length[first : first + ENDINGS_PER_LENGTH_GROUP]
        waiting.sort(key=lambda cut: (cut.log_likelihood, cut.ending))
        while ring := _ring(waiting):
            yield ring
            waiting = [cut for cut in waiting if cut not in ring]


def _ring(cuts: list[_Cut]) -> list[_Cut]:
    """Return a ring in which any four neighbours can share an item; empty if there is none."""
    ring: list[_Cut] = []
    left = list(cuts)
    while left and len(ring) < RING_SIZE:
        chosen = next((cut for cut in left if _fits(cut, ring[1 - NUM_CHOICES :])), None)
        if chosen is None:
            break
        ring.append(chosen)
        left.remove(chosen)
    while len(ring) >= NUM_CHOICES:
        around = [*ring[1 - NUM_CHOICES :], *ring[: NUM_CHOICES - 1]]
        if all(_fits(around[i], around[i + 1 : i + NUM_CHOICES]) for i in range(NUM_CHOICES - 1)):
            return ring
        ring.pop()
    return []


def _fits(cut: _Cut, others: Sequence[_Cut]) -> bool:
    return all(
        cut.document != other.document
        and cut.ending.split()[0] != other.ending.split()[0]
        and _common_words(cut.ending, other.ending) <= MAX_COMMON_WORDS
        for other in others
    )


def _common_words(first: str, second: str) -> float:
    a, b = set(first.lower().split()), set(second.lower().split())
    return len(a & b) / min(len(a), len(b))


def _distinct(items: list[LastWordItem]) -> list[LastWordItem]:
    distinct = {" ".join([*words_of(item.context)[-4:], item.word]): item for item in items}
    return _in_hash_order(distinct.values(), lambda item: item.context + item.word)


def _spread_over_words(items: list[LastWordItem], limit: int) -> list[LastWordItem]:
    """Return the first `limit` items, without too many that ask for the same word."""
    most = max(1, int(MAX_SAME_WORD_SHARE * limit))
    counts: Counter[str] = Counter()
    kept: list[LastWordItem] = []
    for item in items:
        counts[item.word] += 1
        if counts[item.word] <= most and len(kept) < limit:
            kept.append(item)
    return kept


def _in_hash_order(items: Iterable[Item], text: Callable[[Item], str]) -> list[Item]:
    return sorted(items, key=lambda item: _hash(text(item)))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
