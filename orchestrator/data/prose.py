"""Tell English words from code, for test items made from held-out text."""

from __future__ import annotations

import re

_WORDS = """
a an the this that these those it its he she they them we you your our i me his her
their is are was were be been being am will would can could may might must shall should
do does did has have had not no nor and or but if then else when while until because as
so than of in on at by to from for with without into onto over under after before
between through about there here which who whose whom what where why how all any both
each few more most other some such only own same too very just also
"""
GRAMMAR_WORDS = frozenset(_WORDS.split())

_PLAIN_WORD = re.compile(
    r"[(\"'\[]*[A-Za-z][a-z]*(?:[-'/][A-Za-z]?[a-z]+)*[)\"'\]]*[.,;:!?]*[)\"'\]]*"
)


def plain_word_fraction(text: str) -> float:
    """Return the fraction of plain words; code names and numbers do not count as plain."""
    words = text.split()
    return sum(1 for word in words if _PLAIN_WORD.fullmatch(word)) / max(1, len(words))
