"""Where documents come from: the embedded text, the user's files, or a data set on the hub.

Every source becomes a stream of documents, so that a corpus larger than memory passes through. A
record of a `.jsonl` or `.parquet` file or of a data set is a document. A `.txt` file holds
documents between `<|endoftext|>` marks if it has any; otherwise, a file whose blank-line blocks are
mostly a short title line and text holds one document a block; otherwise the file is one document.
Documents of book length are cut at paragraph ends into passages, so that even a single book divides
into training and validation. Equal documents count once. The split is by hash of the text: a
document's side never depends on its neighbours.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator.data.hub import require_hub
from orchestrator.data.python_docs import PYTHON_DOCS_VERSION, python_documents, python_state
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError, quoted
from orchestrator.workspace.files import expand_user

DOCUMENT_MARK = "<|endoftext|>"
LONG_DOCUMENT_CHARACTERS = 8000
PASSAGE_CHARACTERS = 4000
TITLE_CHARACTERS = 100
LINES_LOOKED_AT = 1000
"""Lines of a file that say whether a field is missing in one of them or in all."""
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """All documents in memory; for corpora that fit."""

    documents: tuple[Document, ...]

    def split(self, fraction: float) -> tuple[list[Document], list[Document]]:
        """Return training and validation documents; see `is_validation`."""
        train = [d for d in self.documents if not is_validation(d.text, fraction)]
        validation = [d for d in self.documents if is_validation(d.text, fraction)]
        return train, validation


def read_corpus(settings: DataSettings, progress: Progress | None = None) -> Corpus:
    """Read the whole corpus into memory.

    Raises:
        UserError: See `read_documents`.
    """
    return Corpus(tuple(read_documents(settings, progress)))


def read_documents(settings: DataSettings, progress: Progress | None = None) -> Iterator[Document]:
    """Yield the documents of the source, equal ones once, at most `max_documents`.

    Raises:
        UserError: If a file is missing, unreadable or of another kind, `text_field` is wrong, or
            the hub cannot be reached.
    """
    progress = progress or Progress()
    seen: set[bytes] = set()
    for document in _read_source(settings, progress):
        data = document.text.strip().encode("utf-8", "replace")
        text = data.decode("utf-8")  # half surrogates, which JSON can hold, are no text
        digest = hashlib.blake2b(data, digest_size=12).digest()
        if text and digest not in seen:
            seen.add(digest)
            yield Document(text, document.source)
            if settings.max_documents is not None and len(seen) >= settings.max_documents:
                return


def is_validation(text: str, fraction: float) -> bool:
    """Tell whether a document is held out."""
    return hash_fraction(text, "split") < fraction


def hash_fraction(text: str, purpose: str) -> float:
    """Return a hash of a text as a number in [0, 1), another one for each purpose."""
    data = text.encode("utf-8", "replace")
    digest = hashlib.blake2b(data, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def source_state(settings: DataSettings) -> Any:
    """Return a JSON-able value that changes when the source's content does, without reading the
    content.

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


def find_files(settings: DataSettings) -> list[Path]:
    """Return the absolute paths that `data.files` names, sorted, each once.

    Raises:
        UserError: If a pattern matches nothing or a file's kind is not supported.
    """
    if not settings.files:
        raise UserError(
            "data.source is `files`, but data.files is empty; name text files, such as "
            "--set 'data.files=[books/*.txt]'"
        )
    found: set[Path] = set()
    for pattern in settings.files:
        try:
            found.update(_files_of(pattern))
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # A text that can be no path.
            raise UserError(
                f"data.files: {quoted(pattern)} is no path or pattern of files ({error})"
            ) from None
    for path in sorted(found):
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"data.files: cannot read {path}; the kinds are {', '.join(SUFFIXES)}")
    return sorted(found)


def _files_of(pattern: str) -> list[Path]:
    """Return the files that a path or pattern names; a folder stands for the texts within."""
    if not pattern:
        raise UserError("data.files: a name is empty; name a file, a folder or a pattern")
    path = Path.cwd() / expand_user(pattern)
    if path.is_dir():
        files = [f for f in path.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file()]
        if not files:
            raise UserError(
                f"data.files: the folder {path} holds no text; the kinds are {', '.join(SUFFIXES)}"
            )
    else:
        root = Path(path.anchor)
        # A name that exists is meant as it is, even with brackets in it.
        matches = [path] if path.is_file() else root.glob(str(path.relative_to(root)))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise UserError(
                f"data.files: no file matches {quoted(pattern)} (looked from {Path.cwd()})"
            )
    return [file.resolve() for file in files]


def _read_source(settings: DataSettings, progress: Progress) -> Iterator[Document]:
    if settings.source == "python":
        for text, source in python_documents(progress):
            yield Document(text, source)
    elif settings.source == "hub":
        yield from _read_hub(settings, progress)
    else:
        files = find_files(settings)
        progress.start("corpus", len(files))
        for done, path in enumerate(files):
            for text in _read_file(path, settings.text_field):
                for passage in cut_long(text):
                    yield Document(passage, path.name)
            progress.advance(done + 1, path.name)


def _read_file(path: Path, text_field: str) -> Iterator[str]:
    try:
        if path.name.endswith(".txt"):
            text = path.read_text(encoding="utf-8-sig")
            _check_has_no_nul(text, path)
            yield from split_text_file(text)
        elif path.name.endswith(".parquet"):
            yield from _read_parquet(path, text_field)
        else:
            yield from _read_json_lines(path, text_field)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def split_text_file(text: str) -> list[str]:
    """Return the documents of a text file; the rule stands at the top of this module."""
    text = text.replace("\r\n", "\n")
    if DOCUMENT_MARK in text:
        return text.split(DOCUMENT_MARK)
    blocks = [block.strip().split("\n") for block in text.split("\n\n") if block.strip()]
    titled = [block for block in blocks if len(block) > 1 and len(block[0]) <= TITLE_CHARACTERS]
    # Hard-wrapped paragraphs have first lines as long as the others; titles are short.
    if len(blocks) > 2 and len(titled) >= 0.9 * len(blocks):
        first = median(len(block[0]) for block in titled)
        longest = median(max(map(len, block[1:])) for block in titled)
        if first < 0.6 * longest:
            return ["\n".join(block) for block in blocks]
    return [text]


def cut_long(text: str) -> Iterator[str]:
    """Yield a document as it is, or in passages that end with a paragraph if it is of book
    length."""
    if len(text) <= LONG_DOCUMENT_CHARACTERS:
        yield text
        return
    separator = "\n\n" if "\n\n" in text else "\n"
    passage: list[str] = []
    size = 0
    for paragraph in text.split(separator):
        passage.append(paragraph)
        size += len(paragraph) + len(separator)
        if size >= PASSAGE_CHARACTERS:
            yield separator.join(passage)
            passage, size = [], 0
    if passage:
        yield separator.join(passage)


def _read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                _check_has_no_nul(line, path)
                raise UserError(
                    f"{path}, line {number} is not JSON; each line holds one object"
                ) from None
            place = f"{path}, line {number}"
            if isinstance(record, dict) and text_field not in record:
                _blame_single_line(path, text_field, place)
            yield _text_of(record, text_field, place)


def _check_has_no_nul(text: str, path: Path) -> None:
    """Refuse what is valid UTF-8 and still no text, such as UTF-16 without a mark."""
    place = text.find("\0")
    if place >= 0:
        raise UserError(
            f"{path} holds NUL bytes (the first as character {place + 1}), so it is UTF-16 or no "
            "text at all; convert it to UTF-8 first"
        )


def _blame_single_line(path: Path, text_field: str, place: str) -> None:
    """Raise an error about this line alone where other lines of the file have the field."""
    num_lines = num_having = 0
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        for line in islice(filter(str.strip, file), LINES_LOOKED_AT):
            num_lines += 1
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                num_having += isinstance(record, dict) and text_field in record
    if num_having:
        raise UserError(
            f"{place} has no field {text_field!r}, and {num_having:,} of the first {num_lines:,} "
            "lines have it; correct that line or remove it"
        )


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            raise UserError(_no_field(text_field, file.schema_arrow.names, str(path)))
        for batch in file.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield _text_of({text_field: text or ""}, text_field, str(path))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None


def _text_of(record: Any, text_field: str, place: str) -> str:
    if not isinstance(record, dict):
        raise UserError(
            f"{place} holds {_in_words(record)}, not an object with a field {text_field!r}"
        )
    if text_field not in record:
        raise UserError(_no_field(text_field, list(record), place))
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(
            f"{place}: the field {text_field!r} holds {_in_words(text)}, not text; correct it or "
            "remove it"
        )
    return text


def _in_words(value: Any) -> str:
    """Say what kind of value JSON holds, as people call it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true or false"
    kinds = ((str, "a text"), (int | float, "a number"), (list, "a list"), (dict, "an object"))
    return next(
        (words for kind, words in kinds if isinstance(value, kind)), "another kind of value"
    )


def _no_field(text_field: str, names: list[str], place: str) -> str:
    return (
        f"{place} has no field {text_field!r} but {', '.join(map(repr, names)) or 'none at all'}; "
        "name the one with the text by --set data.text_field=NAME"
    )


def _check_hub_settings(settings: DataSettings) -> None:
    if not settings.hub_name:
        raise UserError(
            "data.source is `hub`, but data.hub_name is empty; name a data set, such as "
            "--set data.hub_name=cerebras/SlimPajama-627B"
        )


def _read_hub(settings: DataSettings, progress: Progress) -> Iterator[Document]:
    _check_hub_settings(settings)
    if not Path(settings.hub_name).is_dir():
        require_hub(f"the data set {settings.hub_name}")
    import datasets

    progress.start("corpus", settings.max_documents)
    try:
        stream = datasets.load_dataset(
            settings.hub_name, settings.hub_config, split="train", streaming=True
        )
        for number, record in enumerate(stream):
            place = f"{settings.hub_name}, record {number}"
            for passage in cut_long(_text_of(record, settings.text_field, place)):
                yield Document(passage, settings.hub_name)
            progress.advance(number + 1, settings.hub_name)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises dozens of kinds
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the data set {settings.hub_name}: {reason}") from None
