"""Stream the documents of a text source.

A corpus is never held in memory as a whole. A hash of a document's text decides whether it is held
out, so the split does not depend on other documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.data.text_source import text_source
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress


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
    progress = progress or Progress()
    progress.start("corpus")  # Sources that know how much there is start again.
    for text, source in text_source(settings).documents(progress):
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
    source = text_source(settings)
    state = source.state()
    # Absent at first, so that keys of earlier versions stay.
    return [source.version, state] if source.version > 1 else state
