"""Texts that people read, stored in `fixtures/texts`: a test compares them with what is shown now.

A test that fails says how to store the new text, if it is the one that is meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "fixtures" / "texts"


def assert_as_stored(name: str, parts: Mapping[str, Iterable[str]], folder: Path) -> None:
    """Compare a stored text with lines under titles.

    Args:
        folder: Gets the new text.
    """
    lines = (line.rstrip() for title, part in parts.items() for line in (f"# {title}", *part, ""))
    text = "\n".join(lines)
    new = folder / name
    new.write_text(text, encoding="utf-8")
    stored = FOLDER / name
    stored_text = stored.read_text("utf-8") if stored.exists() else ""
    assert text == stored_text, f"if this is meant: cp {new} {stored}"
