"""English text from the Python that runs the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.data import python_docs
from orchestrator.data.corpus import is_validation
from orchestrator.data.prose import plain_word_fraction
from orchestrator.data.python_docs import python_documents, python_files, python_state
from orchestrator.terminal.progress import Progress


def test_docstrings_and_comments_are_read_in_order(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "module.py").write_text(
        '"""This module holds everything that a bird needs to fly over the sea."""\n'
        "# The wings are made of many feathers, which are light,\n"
        "# and of bones, which are hollow.\n"
        "WINGS = 2\n"
        "# x = WINGS + 1\n# y = x * 2\n"
        "class Bird:\n"
        '    """A bird is an animal that lays eggs and has a beak."""\n'
        "    def fly(self):\n"
        '        """Move through the air for as long as the strength of the bird lasts."""\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "unread.py").write_text('"""Nobody should read this sentence."""')
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    documents = [d for d in python_documents(Progress()) if not d[1].startswith("topics/")]
    assert documents == [
        (
            "This module holds everything that a bird needs to fly over the sea.\n\n"
            "The wings are made of many feathers, which are light, and of bones, which are "
            "hollow.\n\n"
            "A bird is an animal that lays eggs and has a beak.\n\n"
            "Move through the air for as long as the strength of the bird lasts.",
            "module.py",
        )
    ]


def test_the_state_lists_the_files() -> None:
    state = python_state()
    assert len(state) == len(python_files()) > 300
    assert state == python_state()
    assert not [name for name, _ in state if "test" in str(name).split("/")]


@pytest.mark.slow
def test_the_python_documentation_is_large_and_is_prose() -> None:
    documents = list(python_documents(Progress()))
    texts = [text for text, _ in documents]
    assert len(set(texts)) == len(texts) > 800
    assert sum(map(len, texts)) > 1_200_000
    # A paragraph counts with the blank line after it.
    assert all(len(text) + 2 >= python_docs.MIN_DOCUMENT_CHARACTERS for text in texts)
    assert plain_word_fraction(" ".join(texts)) > 0.9
    held_out = sum(len(text) for text in texts if is_validation(text, 0.1))
    assert 0.06 < held_out / sum(map(len, texts)) < 0.14
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
