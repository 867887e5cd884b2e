"""Extract paragraphs of English from plain-text documentation.

The input is a docstring, a help topic or a block comment. Each paragraph of the output is one line
without markup; code and signatures are removed. `NoveltyFilter` drops repeated paragraphs: the same
text in training and validation would make the held-out tasks worthless.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from dataclasses import dataclass

MIN_WORDS = 4
MIN_PLAIN_FRACTION = 0.72
MIN_LETTER_FRACTION = 0.86
MAX_WORDS_PER_GRAMMAR_WORD = 11
SHINGLE_WORDS = 6
MAX_SEEN_FRACTION = 0.4
WRAP_SLACK = 12

_WORDS = """
a an the this that these those it its he she they them we you your our i me his her
their is are was were be been being am will would can could may might must shall should
do does did has have had not no nor and or but if then else when while until because as
so than of in on at by to from for with without into onto over under after before
between through about there here which who whose whom what where why how all any both
each few more most other some such only own same too very just also
"""
GRAMMAR_WORDS = frozenset(_WORDS.split())

_RULER = re.compile(r"^\s*([=\-~^*#+_.\"'`])\1{2,}\s*$")
_BULLET = re.compile(r"^(\s*)(?:[*+•-]|o|\(?\d{1,2}[.)]|\(?[a-z]\))\s+(?=\S)")
_CODE_START = re.compile(
    r"^\s*(?:>>>|\.\.\.\s|\.\. |\$ |% |@\w|#!|def |class \w+[(:]|import "
    r"|from \w+ import |[:@]\w+[^:]*:)"
)
_SENTENCE_END = re.compile(r"[.!?][)\"'\]]*$")
_LEGAL = re.compile(r"copyright|warrant|redistribut|rights reserved|licen[cs]e", re.IGNORECASE)
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
    """A paragraph, a list item or a heading."""

    text: str
    is_item: bool = False


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of prose in a hard-wrapped documentation text."""
    kept: list[_Chunk] = []
    for chunk in _chunks(inspect.cleandoc(text).expandtabs()):
        plain = strip_markup(chunk.text)
        # A paragraph that ends with a colon introduces a list (kept) or code (removed).
        is_kept = is_prose(plain.rstrip(":") + "." * plain.endswith(":"))
        if plain[:1].islower() and (kept or plain.split()[0] in GRAMMAR_WORDS):
            is_kept = False  # the rest of a sentence that code interrupts
        kept.append(_Chunk(plain if is_kept else "", chunk.is_item))
    return _drop_introductions(kept)


def strip_markup(text: str) -> str:
    """Remove Sphinx roles, backquotes, emphasis and footnote marks; collapse whitespace."""
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def is_prose(text: str) -> bool:
    """Return whether a paragraph is English sentences, not code, a table or a signature."""
    words = text.split()
    if (
        len(words) < MIN_WORDS
        or not _SENTENCE_END.search(text)
        or not (text[0].isalnum() or text[0] in "\"'(")
        or _LEGAL.search(text)
    ):
        return False
    letters = sum(1 for character in text if character.isalpha() or character in " ,.'-")
    grammar = sum(1 for word in words if word.lower().strip(".,;:!?()\"'") in GRAMMAR_WORDS)
    return (
        plain_word_fraction(text) >= MIN_PLAIN_FRACTION
        and letters >= MIN_LETTER_FRACTION * len(text)
        and grammar * MAX_WORDS_PER_GRAMMAR_WORD >= len(words)
    )


def plain_word_fraction(text: str) -> float:
    """Return the fraction of plain words; code names and numbers do not count as plain."""
    words = text.split()
    return sum(1 for word in words if _PLAIN_WORD.fullmatch(word)) / max(1, len(words))


def _chunks(text: str) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if line.strip() and not _RULER.match(line)]
        width = max(map(len, lines), default=0)
        chunk: list[str] = []
        is_item, indent, previous = False, 0, ""
        for line in lines:
            start = len(line) - len(line.lstrip())
            bullet = _BULLET.match(line)
            moved = start != indent and len(chunk) > 1  # the second line may hang under the first
            is_new = bullet or moved or _CODE_START.match(line) or _is_cut(previous, line, width)
            if chunk and is_new:
                chunks.append(_Chunk(" ".join(chunk), is_item))
                chunk, is_item = [], False
            is_item = is_item or bullet is not None
            chunk.append(line[bullet.end() :].strip() if bullet else line.strip())
            if len(chunk) <= 2:
                indent = start
            previous = line
        if chunk:
            chunks.append(_Chunk(" ".join(chunk), is_item))
    return chunks


def _is_cut(line: str, following: str, width: int) -> bool:
    # A line ends early if the next line's first word, capitalized, would have fit.
    word = following.split()[0]
    return word[0].isupper() and len(line) + len(word) + WRAP_SLACK < width


def _drop_introductions(chunks: list[_Chunk]) -> list[str]:
    # A final sentence that ends with a colon is kept only before a list item.
    texts: list[str] = []
    for position, chunk in enumerate(chunks):
        follower = chunks[position + 1] if position + 1 < len(chunks) else _Chunk("")
        text = chunk.text
        if text.endswith(":") and not (follower.is_item and follower.text):
            text = text[: max(map(text.rfind, (". ", "? ", "! "))) + 1]
        if text:
            texts.append(text)
    return texts


class NoveltyFilter:
    """Recognizes paragraphs whose runs of `SHINGLE_WORDS` words were seen before."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """Return whether the paragraph is new, and remember it."""
        words = re.findall(r"[a-z0-9]+", text.lower())
        num_runs = max(1, len(words) - SHINGLE_WORDS + 1)
        runs = {_hash(" ".join(words[i : i + SHINGLE_WORDS])) for i in range(num_runs)}
        num_seen = len(runs & self._seen)
        self._seen |= runs
        return num_seen <= MAX_SEEN_FRACTION * len(runs)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
