"""From held-out documents to test items: pure text work, the same items for the same documents.

`lastword` (as LAMBADA): a passage that stops before its last word. The word is a content word,
and the text gives a reason to expect it: it stands in the passage already, or the training text
has it after the same word. `continuation` (as HellaSwag): a passage that stops within a sentence,
and four endings. Each ending is the right answer of one item and a wrong answer of three others
of other documents, chosen among those next to it in length and with the same kind of first word,
so that nothing in an ending itself tells whether it is right: a model that ignores the passage
gets one in four. Passages are slices of the documents, unchanged, and begin with a sentence.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from orchestrator.data.corpus import Document
from orchestrator.data.prose import GRAMMAR_WORDS, plain_share

Item = TypeVar("Item")

NUM_CHOICES = 4
MIN_CONTEXT_WORDS = 8
MIN_SENTENCE_WORDS = 7
MIN_ENDING_WORDS = 4
MAX_ENDING_WORDS = 12
MIN_PLAIN_SHARE = 0.85
MAX_SAME_WORD_SHARE = 0.02
BLOCK_ITEMS = 12
MAX_COMMON_WORDS = 0.5

_SENTENCE = re.compile(r"\S.*?[.!?][\"')\]]*(?=\s+[\"'(\[]*[A-Z0-9]|\s*$)", re.DOTALL)
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|eg|ie|etc|vs|cf|al|Mr|Mrs|Ms|Dr|St|No|pp?)|\b[A-Z])\.$"
)
_LAST_WORD = re.compile(r"(?<= )([a-z]{3,})(?=[.,;:!?](?: |$))")
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


@dataclass(frozen=True)
class LastWordItem:
    """A passage without its last word, and the word."""

    context: str
    word: str
    source: str


@dataclass(frozen=True)
class ContinuationItem:
    """A passage, four endings, and which of them is the right one."""

    context: str
    endings: tuple[str, ...]
    label: int
    source: str


@dataclass(frozen=True)
class _Sentence:
    document: int
    start: int
    end: int


@dataclass(frozen=True)
class _Cut:
    """A passage and how it goes on."""

    document: int
    context: str
    ending: str
    kind: str


class ItemBuilder:
    """Cuts items out of documents.

    Args:
        documents: The held-out documents.
        count_tokens: Number of tokens of a text.
        max_tokens: Longest passage with its ending, in tokens.
    """

    def __init__(
        self, documents: Sequence[Document], count_tokens: Callable[[str], int], max_tokens: int
    ) -> None:
        self.documents = documents
        self._count_tokens = count_tokens
        self._max_tokens = max_tokens
        self._sentences = [list(_sentences(i, d.text)) for i, d in enumerate(documents)]

    def last_words(
        self, known_pairs: Collection[tuple[str, str]], limit: int
    ) -> list[LastWordItem]:
        """Return at most `limit` items, spread over the documents by hash.

        Args:
            known_pairs: Pairs of neighbouring words of the training text, in lower case.
            limit: Most items.
        """
        items: dict[str, LastWordItem] = {}
        for sentence, text in self._good_sentences():
            source = self.documents[sentence.document].source
            # One item a sentence: at its end, or at the last comma before which a word will do.
            for match in reversed(list(_LAST_WORD.finditer(text))):
                word = match[1]
                context = self._passage(sentence, text[: match.start() - 1], f" {word}")
                if context is not None and _is_expected(word, context, known_pairs):
                    end = " ".join([*_words(context)[-3:], word])
                    items.setdefault(end, LastWordItem(context, word, source))
                    break
        in_order = _in_hash_order(items.values(), lambda item: item.context + item.word)
        return _limit_words(in_order, limit)

    def continuations(self, limit: int) -> list[ContinuationItem]:
        """Return at most `limit` items, spread over the documents by hash."""
        found: dict[str, _Cut] = {}
        for sentence, text in self._good_sentences():
            position = _cut_position(text)
            if position is None:
                continue
            ending = text[position + 1 :]
            context = self._passage(sentence, text[:position], f" {ending}")
            if context is not None:
                kind = text[position + 1 :].split(" ", 1)[0].lower()
                found.setdefault(ending.lower(), _Cut(sentence.document, context, ending, kind))
        cuts = _in_hash_order(found.values(), lambda cut: cut.context + cut.ending)[:limit]
        return self._with_choices(cuts)

    def _good_sentences(self) -> Iterator[tuple[_Sentence, str]]:
        for sentences in self._sentences:
            for sentence in sentences:
                text = self.documents[sentence.document].text[sentence.start : sentence.end]
                if _is_good(text):
                    yield sentence, text

    def _passage(self, sentence: _Sentence, head: str, ending: str) -> str | None:
        """Return `head` and the sentences before it that fit; None if none does or it is short."""
        text = self.documents[sentence.document].text
        if self._count_tokens(head + ending) > self._max_tokens:
            return None
        start = sentence.start
        for earlier in reversed(self._sentences[sentence.document]):
            if earlier.start >= sentence.start:
                continue
            wider = text[earlier.start : sentence.start] + head
            if self._count_tokens(wider + ending) > self._max_tokens:
                break
            start = earlier.start
        context = text[start : sentence.start] + head
        is_long = len(context.split()) >= MIN_CONTEXT_WORDS
        return context if is_long and plain_share(context) >= MIN_PLAIN_SHARE else None

    def _with_choices(self, cuts: list[_Cut]) -> list[ContinuationItem]:
        items: list[ContinuationItem] = []
        for block in _blocks(sorted(cuts, key=lambda cut: (len(cut.ending), cut.ending))):
            for position, cut in enumerate(block):
                others = [block[(position + i) % len(block)] for i in range(1, NUM_CHOICES)]
                endings = [cut.ending, *(other.ending for other in others)]
                order = sorted(range(NUM_CHOICES), key=lambda i: _hash(cut.context + endings[i]))
                items.append(
                    ContinuationItem(
                        cut.context,
                        tuple(endings[i] for i in order),
                        order.index(0),
                        self.documents[cut.document].source,
                    )
                )
        return _in_hash_order(items, lambda item: item.context)


def word_pairs(text: str) -> set[tuple[str, str]]:
    """Return the pairs of neighbouring words of a text that occur at least twice, in lower case."""
    words = _words(text)
    counts = Counter(pairwise(words))
    return {pair for pair, count in counts.items() if count > 1}


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _is_expected(word: str, context: str, known_pairs: Collection[tuple[str, str]]) -> bool:
    before = _words(context)
    return word not in GRAMMAR_WORDS and (word in before or (before[-1], word) in known_pairs)


def _sentences(document: int, text: str) -> Iterator[_Sentence]:
    """Yield the sentences of a document, none across a blank line."""
    for block in re.finditer(r"\S(?:.(?!\n\s*\n))*.?", text, re.DOTALL):
        start = None
        for match in _SENTENCE.finditer(block[0]):
            if start is None:
                start = match.start()
            if not _ABBREVIATION.search(match[0]):
                yield _Sentence(document, block.start() + start, block.start() + match.end())
                start = None


def _is_good(text: str) -> bool:
    """Tell whether a sentence is plain prose that stands by itself."""
    return (
        len(text.split()) >= MIN_SENTENCE_WORDS
        and text[0].isupper()
        and text[-1] in ".!?"
        and "\n" not in text
        and plain_share(text) >= MIN_PLAIN_SHARE
        and text.count('"') % 2 == 0
        and text.count("(") == text.count(")")
    )


def _cut_position(text: str) -> int | None:
    """Return the space nearest the middle behind which a phrase of a few words begins."""
    spaces = [match.start() for match in re.finditer(" ", text)]
    fitting = spaces[-MAX_ENDING_WORDS : 1 - MIN_ENDING_WORDS]
    positions = [position for position in fitting if _begins_phrase(text, position)]
    return min(positions, key=lambda position: abs(2 * position - len(text)), default=None)


def _begins_phrase(text: str, position: int) -> bool:
    head, word = text[:position], text[position + 1 :].split(" ", 1)[0]
    is_inside = head.count('"') % 2 == 1 or head.count("(") > head.count(")")
    return word in GRAMMAR_WORDS and not is_inside


def _blocks(cuts: list[_Cut]) -> Iterator[list[_Cut]]:
    """Yield rings of endings of like length; the three behind one are its wrong answers."""
    waiting: list[_Cut] = []
    for cut in cuts:
        waiting.append(cut)
        if len(waiting) >= BLOCK_ITEMS:
            ring = _ring(waiting)
            if ring:
                yield ring
                waiting = [cut for cut in waiting if cut not in ring]
    if len(waiting) >= NUM_CHOICES:
        ring = _ring(waiting)
        if ring:
            yield ring


def _ring(cuts: list[_Cut]) -> list[_Cut]:
    """Return a long order in which any four neighbours, around the end too, may share an item."""
    ring: list[_Cut] = []
    left = list(cuts)
    while left:
        chosen = next((cut for cut in left if _fits(cut, ring[1 - NUM_CHOICES :])), None)
        if chosen is None:
            break
        ring.append(chosen)
        left.remove(chosen)
    while len(ring) >= NUM_CHOICES:
        tail = [*ring[1 - NUM_CHOICES :], *ring[: NUM_CHOICES - 1]]
        if all(_fits(tail[i], tail[i + 1 : i + NUM_CHOICES]) for i in range(NUM_CHOICES - 1)):
            return ring
        ring.pop()
    return []


def _fits(cut: _Cut, others: Sequence[_Cut]) -> bool:
    return all(
        cut.document != other.document
        and _common_words(cut.ending, other.ending) <= MAX_COMMON_WORDS
        for other in others
    )


def _common_words(first: str, second: str) -> float:
    a, b = set(first.lower().split()), set(second.lower().split())
    return len(a & b) / min(len(a), len(b))


def _limit_words(items: list[LastWordItem], limit: int) -> list[LastWordItem]:
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
