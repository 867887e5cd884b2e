"""Find and read the user's text files: `.txt`, `.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.parquet`.

A record of a `.jsonl` or `.parquet` file is a document. A `.txt` file is split at `<|endoftext|>`
marks if it has any; otherwise at blank lines, if most blocks are a short title line followed by
text; otherwise the whole file is one document.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import median
from typing import IO, Any

from orchestrator.settings import DataSettings
from orchestrator.workspace.errors import UserError, quoted
from orchestrator.workspace.files import expand_user

DOCUMENT_MARK = "<|endoftext|>"
LONG_DOCUMENT_CHARACTERS = 8000
PASSAGE_CHARACTERS = 4000
TITLE_CHARACTERS = 100
MAX_LINES_CHECKED = 1000
"""Lines searched to find out whether a field is missing in one line or in the whole file."""
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_KIND_NAMES: dict[type, str] = {
    type(None): "nothing (null)",
    bool: "true or false",
    str: "a text",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def find_files(settings: DataSettings) -> list[Path]:
    """Return the absolute paths that `data.files` names, sorted, each once.

    Raises:
        UserError: If a pattern matches nothing or a file's kind is not supported.
    """
    if not settings.files:
        raise UserError(
            "the source `files` reads data.files, which is empty; name text files, such as "
            "--set 'data.files=[books/*.txt]'"
        )
    found: set[Path] = set()
    for pattern in settings.files:
        try:
            found.update(_matching_files(pattern))
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"data.files: {quoted(pattern)} is not a valid path or file pattern ({error})"
            ) from None
    for path in sorted(found):
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"data.files: cannot read {path}; the kinds are {', '.join(SUFFIXES)}")
    return sorted(found)


def _matching_files(pattern: str) -> list[Path]:
    if not pattern:
        raise UserError("data.files: a name is empty; name a file, a folder or a pattern")
    path = Path.cwd() / expand_user(pattern)
    if path.is_dir():
        files = [f for f in path.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file()]
        problem = f"the folder {path} holds no text; the kinds are {', '.join(SUFFIXES)}"
    else:
        root = Path(path.anchor)
        # A file that exists is taken literally, even with brackets in its name.
        matches = [path] if path.is_file() else root.glob(str(path.relative_to(root)))
        files = [match for match in matches if match.is_file()]
        problem = f"no file matches {quoted(pattern)} (searched from {Path.cwd()})"
    if not files:
        raise UserError(f"data.files: {problem}")
    return [file.resolve() for file in files]


def read_file(path: Path, text_field: str) -> Iterator[str]:
    """Yield the documents of one file.

    Raises:
        UserError: If it cannot be read, is not UTF-8 text, or a record has no `text_field`.
    """
    try:
        if path.name.endswith(".txt"):
            text = path.read_text(encoding="utf-8-sig")
            _check_no_nul(text, path)
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
    """Return the documents of a `.txt` file; see the module's docstring for the rule."""
    text = text.replace("\r\n", "\n")
    if DOCUMENT_MARK in text:
        return text.split(DOCUMENT_MARK)
    blocks = [block.strip().split("\n") for block in text.split("\n\n") if block.strip()]
    titled = [block for block in blocks if len(block) > 1 and len(block[0]) <= TITLE_CHARACTERS]
    # In hard-wrapped paragraphs, the first line is as long as the others; titles are shorter.
    if len(blocks) > 2 and len(titled) >= 0.9 * len(blocks):
        first = median(len(block[0]) for block in titled)
        longest = median(max(map(len, block[1:])) for block in titled)
        if first < 0.6 * longest:
            return ["\n".join(block) for block in blocks]
    return [text]


def split_long(text: str) -> Iterator[str]:
    """Yield passages of a document of book length, so that some are held out; others whole."""
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


def record_text(record: Any, text_field: str, place: str) -> str:
    """Return the text of a record; `place` is its file and line, for the error.

    Raises:
        UserError: If the record is not an object, or the field is missing or holds no text.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place} holds {_kind(record)}, not an object with a field {text_field!r}")
    if text_field not in record:
        raise _missing_field(text_field, list(record), place)
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(
            f"{place}: the field {text_field!r} holds {_kind(text)}, not text; correct it or "
            "remove it"
        )
    return text


def _kind(value: Any) -> str:
    return _KIND_NAMES.get(type(value), "another kind of value")


def _missing_field(text_field: str, names: list[str], place: str) -> UserError:
    return UserError(
        f"{place} has no field {text_field!r} but {', '.join(map(repr, names)) or 'none at all'}; "
        "name the one with the text by --set data.text_field=NAME"
    )


def _read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    with _open_lines(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                _check_no_nul(line, path)
                raise UserError(f"{place} is not JSON; each line holds one object") from None
            if isinstance(record, dict) and text_field not in record:
                _check_other_lines(path, text_field, place)
            yield record_text(record, text_field, place)


def _open_lines(path: Path, errors: str = "strict") -> IO[str]:
    # A byte-order mark is not part of the first line.
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", errors=errors)
    if path.name.endswith(".zst"):
        import pyarrow  # Unlike zstandard's own reader, its reader notices a cut file.

        stream = pyarrow.input_stream(path, compression="zstd")
        return io.TextIOWrapper(stream, encoding="utf-8-sig", errors=errors)
    return path.open(encoding="utf-8-sig", errors=errors)


def _check_no_nul(text: str, path: Path) -> None:
    # UTF-16 without a byte order mark can be valid UTF-8.
    place = text.find("\0")
    if place >= 0:
        raise UserError(
            f"{path} holds NUL bytes (the first as character {place + 1}), so it is UTF-16 or no "
            "text at all; convert it to UTF-8 first"
        )


def _check_other_lines(path: Path, text_field: str, place: str) -> None:

    num_lines = num_with_field = 0
    with _open_lines(path, errors="replace") as file:
        for line in islice(filter(str.strip, file), MAX_LINES_CHECKED):
            num_lines += 1
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                num_with_field += isinstance(record, dict) and text_field in record
    if num_with_field:
        raise UserError(
            f"{place} has no field {text_field!r}, but {num_with_field:,} of the first "
            f"{num_lines:,} lines have it; correct that line or remove it"
        )


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            raise _missing_field(text_field, file.schema_arrow.names, str(path))
        for batch in file.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield record_text({text_field: text or ""}, text_field, str(path))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None
