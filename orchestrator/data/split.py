"""Which documents of a text are held out: for each, a hash of its own text decides.

So the split depends neither on the other documents nor on the number of parts of the text.
"""

from __future__ import annotations

import hashlib
import math
from itertools import chain, islice

from orchestrator.data.text import Document, TextSource, read_documents
from orchestrator.settings import DataSettings
from orchestrator.workspace.errors import UserError

FEW_DOCUMENTS = 100
"""In a corpus of fewer documents, at least one is held out, whatever its hash."""


def held_out_fraction(settings: DataSettings, source: TextSource) -> float:
    """Return the held-out share of the documents: `data.validation_fraction`, or more in a small
    corpus, so that one document is held out.

    Raises:
        UserError: If the source cannot be read, or is empty.
    """
    max_documents = min(FEW_DOCUMENTS, settings.max_documents or FEW_DOCUMENTS)
    documents = chain.from_iterable(read_documents(source, part) for part in source.parts())
    hashes = [_unit_hash(document.deciding_text) for document in islice(documents, max_documents)]
    if not hashes:
        raise UserError(
            "the corpus is empty: no document with text was found; check data.source and data.files"
        )
    if 1 < len(hashes) < FEW_DOCUMENTS:
        # The next larger number: a document is held out if its hash is below the fraction.
        return max(settings.validation_fraction, math.nextafter(min(hashes), 1.0))
    return settings.validation_fraction


def document_hash(document: Document) -> bytes:
    """Return a hash of a document, 16 bytes: its text, and where its prompt ends."""
    content = document.text.encode()
    if document.prompt_characters is not None:
        # The same text with another prompt is another example. Text contains no NUL, which
        # separates.
        content += f"\0{document.prompt_characters}".encode()
    return hashlib.blake2b(content, digest_size=16).digest()


def is_validation(text: str, fraction: float) -> bool:
    """Return whether a document with this text is held out."""
    return _unit_hash(text) < fraction


def _unit_hash(text: str) -> float:
    """Return a hash of a text in [0, 1)."""
    data = text.encode("utf-8", "replace")
    # `person` makes this hash independent of the content's key.
    digest = hashlib.blake2b(data, digest_size=8, person=b"split").digest()
    return int.from_bytes(digest, "big") / 2**64
