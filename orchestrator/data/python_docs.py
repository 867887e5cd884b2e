"""The English that every Python carries: help topics, docstrings and the longer comments of the
standard library.

No network and no file of ours: the text comes from the interpreter that runs the program. Sources
are parsed with `ast`, never imported, so that no module's side effects run. Each file gives
documents of one to a few thousand characters in reading order: a class with its methods, a module
with its functions. Between Python versions the text differs a little; the fingerprint of the tokens
says which one a model has seen. About 10 seconds on one core.
"""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from orchestrator.data.prose import Novelty, paragraphs
from orchestrator.terminal.progress import Progress

PYTHON_DOCS_VERSION = 2
"""Raised by hand when the text taken from the same Python changes."""

DOCUMENT_CHARACTERS = 1500
BREAK_CHARACTERS = 600
MIN_DOCUMENT_CHARACTERS = 200
MIN_COMMENT_LINES = 2
LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data",
     "lib2to3", "__phello__", "turtledemo"}
)  # fmt: skip

_COMMENT = re.compile(r"^\s*#+(?: (.*)|)$")
_TOPIC_HEADING = re.compile(r"^(\S.*)\n([*=\-~^])\2{3,}$", re.MULTILINE)


def python_files() -> list[Path]:
    """Return the standard library's source files in a fixed order."""
    found = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in LEFT_OUT and name != "__pycache__"]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def python_state() -> list[list[str | int]]:
    """Return names and sizes of the files, which stand for their content in the source's key."""
    root = Path(sysconfig.get_path("stdlib"))
    return [[path.relative_to(root).as_posix(), path.stat().st_size] for path in python_files()]


def python_documents(progress: Progress) -> Iterator[tuple[str, str]]:
    """Yield (text, source) of every document, paragraphs separated by a blank line.

    Args:
        progress: Told the number of files read.
    """
    novelty = Novelty()
    root = Path(sysconfig.get_path("stdlib"))
    files = python_files()
    progress.start("corpus", len(files))
    yield from _documents(_topic_units(), novelty)
    for done, path in enumerate(files):
        name = path.relative_to(root).as_posix()
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a file of another encoding is one of the encodings' own samples
        yield from _documents(((name, unit) for unit in _source_units(source)), novelty)
        progress.advance(done + 1, name)


def _topic_units() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # left out by some distributions; the docstrings remain
        return
    for name in sorted(topics):
        text = topics[name]
        starts = [match.start() for match in _TOPIC_HEADING.finditer(text)]
        for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
            yield f"topics/{name}", text[start:end]
            yield f"topics/{name}", ""  # a section ends here, and may end its document


def _source_units(source: str) -> Iterator[str]:
    """Yield docstrings and comment blocks in their order; an empty text where a document may
    end."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old escapes in other people's strings
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


def _documents(units: Iterator[tuple[str, str]], novelty: Novelty) -> Iterator[tuple[str, str]]:
    """Put units together into documents; a long one ends at a break, any at a new source."""
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
