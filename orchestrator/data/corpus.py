"""Stream the documents of a corpus: Python's documentation, the user's files, or a hub data set.

A corpus is never held in memory as a whole. A hash of a document's text decides whether it is held
out, so the split does not depend on other documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.hub import require_hub
from orchestrator.data.python_docs import PYTHON_DOCS_VERSION, python_documents, python_state
from orchestrator.data.text_files import find_files, read_file, record_text, split_long
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError


@dataclass(frozen=True)
class Document:
    text: str
    source: str


def read_documents(settings: DataSettings, progress: Progress | None = None) -> Iterator[Document]:
    """Yield the documents of the source, equal ones once, at most `max_documents`.

    Raises:
        UserError: If a file is missing, unreadable or of an unknown kind, `text_field` is wrong, or
            the hub cannot be reached.
    """
    seen: set[bytes] = set()
    for text, source in _read_source(settings, progress or Progress()):
        # JSON can hold lone surrogates, which UTF-8 cannot.
        data = text.strip().encode("utf-8", "replace")
        digest = hashlib.blake2b(data, digest_size=12).digest()
        if data and digest not in seen:
            seen.add(digest)
            yield Document(data.decode("utf-8"), source)
            if settings.max_documents is not None and len(seen) >= settings.max_documents:
                return


def is_validation(text: str, fraction: float) -> bool:
    """Return whether a document is held out."""
    return hash_fraction(text, "split") < fraction


def hash_fraction(text: str, purpose: str) -> float:
    """Return a hash of a text as a number in [0, 1), independent for each purpose."""
    data = text.encode("utf-8", "replace")
    digest = hashlib.blake2b(data, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def source_state(settings: DataSettings) -> Any:
    """Return a JSON-able value that changes when the source's content does; reads no content.

    Raises:
        UserError: If the files do not exist, or the settings name no source.
    """
    if settings.source == "python":
        return ["python", PYTHON_DOCS_VERSION, python_state()]
    if settings.source == "hub":
        _check_hub_settings(settings)
        return ["hub", settings.hub_name, settings.hub_config]
    stats = [(str(path), path.stat()) for path in find_files(settings)]
    return ["files", [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


def _read_source(settings: DataSettings, progress: Progress) -> Iterator[tuple[str, str]]:
    if settings.source == "python":
        yield from python_documents(progress)
    elif settings.source == "hub":
        yield from _read_hub(settings, progress)
    else:
        files = find_files(settings)
        progress.start("corpus", len(files))
        for done, path in enumerate(files):
            for text in read_file(path, settings.text_field):
                yield from ((passage, path.name) for passage in split_long(text))
            progress.advance(done + 1, path.name)


def _check_hub_settings(settings: DataSettings) -> None:
    if not settings.hub_name:
        raise UserError(
            "the source `hub` reads data.hub_name, which is empty; name a data set, such as "
            "--set data.hub_name=cerebras/SlimPajama-627B"
        )


def _read_hub(settings: DataSettings, progress: Progress) -> Iterator[tuple[str, str]]:
    _check_hub_settings(settings)
    name = settings.hub_name
    if not Path(name).is_dir():
        require_hub(f"the data set {name}")
    import datasets

    progress.start("corpus", settings.max_documents)
    try:
        stream = datasets.load_dataset(name, settings.hub_config, split="train", streaming=True)
        for number, record in enumerate(stream):
            text = record_text(record, settings.text_field, f"{name}, record {number}")
            yield from ((passage, name) for passage in split_long(text))
            progress.advance(number + 1, name)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises dozens of kinds
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the data set {name}: {reason}") from None
