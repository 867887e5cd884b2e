"""Paragraphs of English are extracted from documentation."""

from __future__ import annotations

import pytest

from orchestrator.data.prose import NoveltyFilter, is_prose, paragraphs, strip_markup

DOCSTRING = """Return the mean of the numbers.

    The result is a float, even when all of the numbers are integers. An empty
    sequence has no mean.

    Usage::

        >>> mean([1, 2])
        1.5

    The following kinds are known:

    * Whole numbers are the fastest by far, because the
      machine knows them.
    * x = a[0] + b[0]
    * Fractions stay exact as long as they can.

    mean(numbers, *, start=0) -> float
    """


def test_wrapped_lines_are_joined_and_code_is_removed() -> None:
    assert paragraphs(DOCSTRING) == [
        "Return the mean of the numbers.",
        "The result is a float, even when all of the numbers are integers. "
        "An empty sequence has no mean.",
        "The following kinds are known:",
        "Whole numbers are the fastest by far, because the machine knows them.",
        "Fractions stay exact as long as they can.",
    ]


def test_a_sentence_that_introduces_code_is_removed() -> None:
    text = "It can be called at any time. For example, this is the way:\n\n    f(1, 2)\n"
    assert paragraphs(text) == ["It can be called at any time."]


def test_the_rest_of_a_sentence_after_code_is_removed() -> None:
    text = "This is what you want to write.\n\n    >>> f(x)\n\nat the top of your script."
    assert paragraphs(text) == ["This is what you want to write."]


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("See :class:`~email.Message` and *also* ``str``.", "See email.Message and also str."),
        ("the `name' of old manuals", 'the "name" of old manuals'),
        ("It is so [1]_.", "It is so."),
        ("two  spaces\nand a line", "two spaces and a line"),
    ],
)
def test_markup_is_removed(marked: str, plain: str) -> None:
    assert strip_markup(marked) == plain


@pytest.mark.parametrize(
    "text",
    [
        "for i in range(10): print(i).",
        "object.__add__(self, other)",
        "A heading Without an End",
        "Copyright by the authors, all rights reserved as it is.",
        "x = y + z * (a - b) / c[0].",
        "Too short.",
    ],
)
def test_code_headings_and_notices_are_not_prose(text: str) -> None:
    assert not is_prose(text)


def test_a_repeated_paragraph_is_not_new() -> None:
    novelty = NoveltyFilter()
    text = "The quick brown fox jumps over the lazy dog and runs away."
    assert novelty.is_new(text)
    assert not novelty.is_new(text)
    assert not novelty.is_new("Indeed, " + text.lower())
    assert novelty.is_new("An altogether different sentence about cats and their habits.")
