"""From documentation in plain text to paragraphs of English.

In goes a docstring, a help topic or a block comment: hard-wrapped lines, bullets, underlined headings, doctests
and markup. Out come paragraphs as a person would read them aloud: each on one line, markup removed, code and
signatures left out. A paragraph counts as prose by what it is made of (plain words, words of grammar, a
sentence's end), which needs no word list and no model. Paragraphs that say again what was said are dropped by
`Novelty`, because the same text in training and validation would make the held-out tasks worthless.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from dataclasses import dataclass

MIN_WORDS = 4
MIN_PLAIN_SHARE = 0.72
MIN_LETTER_SHARE = 0.86
WORDS_PER_GRAMMAR_WORD = 11
SHINGLE_WORDS = 6
MAX_KNOWN_SHARE = 0.4

GRAMMAR_WORDS = frozenset(
    "a an the this that these those it its he she they them we you your our i me his her their is are was were be "
    "been being am will would can could may might must shall should do does did has have had not no nor and or but "
    "if then else when while until because as so than of in on at by to from for with without into onto over under "
    "after before between through about there here which who whose whom what where why how all any both each few "
    "more most other some such only own same too very just also".split()
)

_RULER = re.compile(r"^\s*([=\-~^*#+_.\"'`])\1{2,}\s*$")
_BULLET = re.compile(r"^(\s*)(?:[*+•-]|o|\(?\d{1,2}[.)]|\(?[a-z]\))\s+(?=\S)")
_CODE_START = re.compile(
    r"^\s*(?:>>>|\.\.\.\s|\.\. |\$ |% |@\w|#!|def |class \w+[(:]|import |from \w+ import |[:@]\w+[^:]*:)"
)
_SENTENCE_END = re.compile(r"[.!?][)\"'\]]*$")
_PLAIN_WORD = re.compile(
    r"[(\"'\[]*[A-Za-z][a-z]*(?:[-'/][A-Za-z]?[a-z]+)*[)\"'\]]*[.,;:!?]*[)\"'\]]*"
)

_MARKUP = (
    (re.compile("[\u2018\u2019]"), "'"),
    (re.compile("[\u201c\u201d]"), '"'),
    (re.compile(r":(?:[a-z]+:)?[a-z]+:`~?!?([^`<]+?)(?:\s*<[^>]*>)?`"), r"\1"),  # :class:`x`
    (re.compile(r"``?([^`]+?)``?(?:__?\b)?"), r"\1"),  # ``code``, `name`
    (re.compile(r"`([^`']+)'"), r'"\1"'),  # `name' as in old manuals
    (re.compile(r"\*\*?(?=\w)([^*]+?)(?<=[\w.)])\*\*?(?!\w)"), r"\1"),  # *emphasis*
    (re.compile(r"(?<=\w)\s?\[\d+\]_?"), ""),  # [1]: footnote
    (re.compile(r"\\(?=[*`\\_])"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r"\s+([.,;:])(?=\s|$)"), r"\1"),
    (re.compile(r"::$"), ":"),
)


@dataclass(frozen=True)
class _Chunk:
    """Lines that belong together: a paragraph, a list item or a heading."""

    text: str
    is_item: bool = False


def paragraphs(text: str) -> list[str]:
    """Return the prose of a documentation text, one paragraph an element.

    Args:
        text: Hard-wrapped plain text; its common indentation is removed.
    """
    kept: list[_Chunk] = []
    for chunk in _chunks(inspect.cleandoc(text).expandtabs()):
        plain = strip_markup(chunk.text)
        if plain.endswith(":"):
            # It leads on to a list (kept) or to code (left out); which of them, the next chunk tells.
            kept.append(_Chunk(plain, chunk.is_item))
        elif is_prose(plain):
            kept.append(_Chunk(plain, chunk.is_item))
        elif kept and not chunk.is_item:
            kept.append(_Chunk(""))
    return _settle_leads(kept)


def strip_markup(text: str) -> str:
    """Remove roles, back quotes, emphasis and footnote marks; collapse white space."""
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def is_prose(text: str) -> bool:
    """Tell whether a paragraph reads as English sentences rather than code, a table or a signature."""
    words = text.split()
    if (
        len(words) < MIN_WORDS
        or not _SENTENCE_END.search(text)
        or not text[0].isalnum() | (text[0] in "\"'(")
    ):
        return False
    plain = sum(1 for word in words if _PLAIN_WORD.fullmatch(word))
    letters = sum(1 for character in text if character.isalpha() or character in " ,.'-")
    grammar = sum(1 for word in words if word.lower().strip(".,;:!?()\"'") in GRAMMAR_WORDS)
    return (
        plain >= MIN_PLAIN_SHARE * len(words)
        and letters >= MIN_LETTER_SHARE * len(text)
        and grammar * WORDS_PER_GRAMMAR_WORD >= len(words)
    )


def _chunks(text: str) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    lines: list[str] = []
    is_item = False

    def close() -> None:
        nonlocal is_item
        if lines:
            chunks.append(_Chunk(" ".join(line.strip() for line in lines), is_item))
        lines.clear()
        is_item = False

    indent = 0
    for line in text.splitlines():
        if not line.strip() or _RULER.match(line):
            close()
            continue
        start = len(line) - len(line.lstrip())
        bullet = _BULLET.match(line)
        if (
            bullet
            or _CODE_START.match(line)
            or (lines and start != indent and len(lines) > is_item)
        ):
            close()
        if bullet:
            is_item = True
            line = line[bullet.end() :]
            start = bullet.end()
        if not lines or len(lines) == 1:
            indent = start  # of the second line too: a hanging indent is no new paragraph
        lines.append(line)
    close()
    return chunks


def _settle_leads(chunks: list[_Chunk]) -> list[str]:
    # A sentence that ends in a colon stays only before the list that it announces.
    texts: list[str] = []
    for position, chunk in enumerate(chunks):
        text = chunk.text
        if text.endswith(":"):
            follower = chunks[position + 1] if position + 1 < len(chunks) else None
            announces = follower is not None and follower.is_item and follower.text[-1:] != ":"
            if not announces or not is_prose(text[:-1] + "."):
                cut = max(text.rfind(". "), text.rfind("? "), text.rfind("! "))
                text = text[: cut + 1]
                if not text or not is_prose(text):
                    continue
        if text:
            texts.append(text)
    return texts


class Novelty:
    """Remembers what was read, and tells what is new.

    A paragraph is known when too many of its runs of six words were seen before, wherever that was. Each run is
    kept as an 8-byte hash.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def is_new(self, text: str) -> bool:
        """Tell whether the paragraph is new, and remember it."""
        words = re.findall(r"[a-z0-9]+", text.lower())
        last = max(1, len(words) - SHINGLE_WORDS + 1)
        runs = {_hash64(" ".join(words[i : i + SHINGLE_WORDS])) for i in range(last)}
        known = sum(1 for run in runs if run in self._seen)
        self._seen |= runs
        return known <= MAX_KNOWN_SHARE * len(runs)


def _hash64(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big"
    )
