"""Sentences of a document, which of them are plain prose, and where one can be cut.

A sentence is a slice, not a copy, so a model reads the text as it was in training. It never crosses
a blank line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.data.prose import GRAMMAR_WORDS, plain_word_fraction

MIN_SENTENCE_WORDS = 7
MIN_ENDING_WORDS = 3
MAX_ENDING_WORDS = 6
MIN_PLAIN_SHARE = 0.85

_BLOCK = re.compile(r"\S(?:.(?!\n\s*\n))*.?", re.DOTALL)
_SENTENCE = re.compile(r"\S.*?[.!?][\"')\]]*(?=\s+[\"'(\[]*[A-Z0-9]|\s*$)", re.DOTALL)
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|eg|ie|etc|vs|cf|al|Mr|Mrs|Ms|Dr|St|No|pp?)|\b[A-Z])\.$"
)


def find_sentences(text: str) -> Iterator[slice]:
    """Yield the slice of each sentence of a document, in order."""
    for block in _BLOCK.finditer(text):
        start = None
        for match in _SENTENCE.finditer(block[0]):
            if start is None:
                start = match.start()
            if not _ABBREVIATION.search(match[0]):
                yield slice(block.start() + start, block.start() + match.end())
                start = None


def is_plain(text: str) -> bool:
    """Return whether a sentence is plain prose that can be understood alone."""
    return (
        len(text.split()) >= MIN_SENTENCE_WORDS
        and text[0].isupper()
        and text[-1] in ".!?"
        and "\n" not in text
        and plain_word_fraction(text) >= MIN_PLAIN_SHARE
        and text.count('"') % 2 == 0
        and text.count("(") == text.count(")")
    )


def cut_position(text: str) -> int | None:
    """Return the space nearest the middle that is followed by a phrase of a few words."""
    spaces = [match.start() for match in re.finditer(" ", text)]
    fitting = spaces[-MAX_ENDING_WORDS : 1 - MIN_ENDING_WORDS]
    positions = [position for position in fitting if _begins_phrase(text, position)]
    return min(positions, key=lambda position: abs(2 * position - len(text)), default=None)


def _begins_phrase(text: str, position: int) -> bool:
    head, word = text[:position], text[position + 1 :].split(" ", 1)[0]
    is_inside = head.count('"') % 2 == 1 or head.count("(") > head.count(")")
    return word in GRAMMAR_WORDS and not is_inside
