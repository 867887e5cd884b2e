"""Which documents of a text are held out: a hash of its own text decides for each.

So a document is on the same side whatever stands before it, and in how many shards the text is.
"""

from __future__ import annotations

import hashlib
import math
from itertools import chain, islice

from orchestrator.data.text import Document, TextSource, read_documents
from orchestrator.settings import DataSettings
from orchestrator.workspace.errors import UserError

FEW_DOCUMENTS = 100
"""In a corpus smaller than this, at least one document is held out whatever its hash."""


def held_out_fraction(settings: DataSettings, source: TextSource) -> float:
    """Return the share of the documents that is held out: `data.validation_fraction`, or more where
    a small corpus has no document below it.

    Raises:
        UserError: If the source cannot be read, or is empty.
    """
    max_documents = min(FEW_DOCUMENTS, settings.max_documents or FEW_DOCUMENTS)
    documents = chain.from_iterable(read_documents(source, shard) for shard in source.shards())
    places = [
        _place_in_split(document.deciding_text) for document in islice(documents, max_documents)
    ]
    if not places:
        raise UserError(
            "the corpus is empty: no document with text was found; check data.source and data.files"
        )
    if 1 < len(places) < FEW_DOCUMENTS:
        # The next larger number: a document is held out if its place is below the fraction.
        return max(settings.validation_fraction, math.nextafter(min(places), 1.0))
    return settings.validation_fraction


def document_hash(document: Document) -> bytes:
    """Return a hash of a document, 16 bytes: its text, and where its prompt ends."""
    content = document.text.encode()
    if document.prompt_characters is not None:
        # The same text with another prompt teaches something else. Text holds no NUL.
        content += f"\0{document.prompt_characters}".encode()
    return hashlib.blake2b(content, digest_size=16).digest()


def is_validation(text: str, fraction: float) -> bool:
    """Return whether a document is held out: its own text decides, no other document."""
    return _place_in_split(text) < fraction


def _place_in_split(text: str) -> float:
    """Return a hash of a text in [0, 1)."""
    data = text.encode("utf-8", "replace")
    # `person` makes it another hash than that of the content.
    digest = hashlib.blake2b(data, digest_size=8, person=b"split").digest()
    return int.from_bytes(digest, "big") / 2**64
