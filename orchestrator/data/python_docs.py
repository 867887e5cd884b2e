"""Read English text from the standard library: help topics, docstrings and longer comments.

This source needs no network. Files are parsed, never imported. The text differs a little between
Python versions; the fingerprint of the tokens identifies it. Reading takes about 10 seconds.
"""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from orchestrator.data.prose import NoveltyFilter, paragraphs
from orchestrator.terminal.progress import Progress

PYTHON_DOCS_VERSION = 2
"""Increase when the same Python gives another text."""

DOCUMENT_CHARACTERS = 1500
BREAK_CHARACTERS = 600
MIN_DOCUMENT_CHARACTERS = 200
MIN_COMMENT_LINES = 2
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data",
     "lib2to3", "__phello__", "__pycache__", "turtledemo"}
)  # fmt: skip

_COMMENT = re.compile(r"^\s*#+(?: (.*)|)$")
_TOPIC_HEADING = re.compile(r"^(\S.*)\n([*=\-~^])\2{3,}$", re.MULTILINE)


def python_files() -> list[Path]:
    """Return the standard library's source files in a fixed order."""
    found = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def python_state() -> list[list[str | int]]:
    """Return names and sizes of the files, which represent their content in the source's key."""
    root = Path(sysconfig.get_path("stdlib"))
    return [[path.relative_to(root).as_posix(), path.stat().st_size] for path in python_files()]


def python_documents(progress: Progress) -> Iterator[tuple[str, str]]:
    """Yield (text, source) of every document, paragraphs separated by a blank line."""
    novelty = NoveltyFilter()
    root = Path(sysconfig.get_path("stdlib"))
    files = python_files()
    progress.start("corpus", len(files))
    yield from _documents(_topic_units(), novelty)
    for done, path in enumerate(files):
        name = path.relative_to(root).as_posix()
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # the library has samples of other encodings
        yield from _documents(((name, unit) for unit in _source_units(source)), novelty)
        progress.advance(done + 1, name)


def _topic_units() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions do not have it; the docstrings remain
        return
    for name in sorted(topics):
        text = topics[name]
        starts = [match.start() for match in _TOPIC_HEADING.finditer(text)]
        for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
            yield f"topics/{name}", text[start:end]
            yield f"topics/{name}", ""  # end of a section: the document may end here


def _source_units(source: str) -> Iterator[str]:
    # Docstrings and comment blocks in order; an empty text where a document may end.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in the library's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    units = [(line, False, text) for line, text in _comments(source)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text:
                is_break = not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                units.append((node.body[0].lineno, is_break, text))
    for _, is_break, text in sorted(units, key=lambda unit: unit[0]):
        if is_break:
            yield ""
        yield text


def _comments(source: str) -> Iterator[tuple[int, str]]:
    block: list[str] = []
    for number, line in enumerate([*source.splitlines(), ""]):
        match = _COMMENT.match(line)
        if match:
            block.append(match[1] or "")
        else:
            if len(block) >= MIN_COMMENT_LINES:
                yield number, "\n".join(block)
            block = []


def _documents(
    units: Iterator[tuple[str, str]], novelty: NoveltyFilter
) -> Iterator[tuple[str, str]]:
    # A long document ends at a break, any document at a new source.
    kept: list[str] = []
    size = 0
    previous = ""
    for source, text in units:
        is_break = not text or source != previous
        if kept and (source != previous or (is_break and size >= BREAK_CHARACTERS)):
            if size >= MIN_DOCUMENT_CHARACTERS:
                yield "\n\n".join(kept), previous
            kept, size = [], 0
        previous = source
        for paragraph in paragraphs(text) if text else ():
            if novelty.is_new(paragraph):
                kept.append(paragraph)
                size += len(paragraph) + 2
        if size >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(kept), source
            kept, size = [], 0
    if size >= MIN_DOCUMENT_CHARACTERS:
        yield "\n\n".join(kept), previous
