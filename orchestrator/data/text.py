"""Documents of data sources of text: Python's help topics, the user's files, data sets of the hub.

A source has parts, which threads share; a part gives its documents always in the same order.
The split, the tokenizer and resuming are the same for all of them (`tokenize.py`).

A record of a `.jsonl` or `.parquet` file is a document; one of a `.jsonl` file may be a prompt with
its completion, of which the completion alone is learned. A file of text (`.txt`, `.md`, `.rst`) is
split at `<|endoftext|>` marks if it has any; otherwise at blank lines, if most blocks are a short
title line followed by text; otherwise the whole file is one document. Local files are read
directly: the `datasets` library reads JSON in blocks, which do not tell the line of an error.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any, BinaryIO, ClassVar, NamedTuple

from orchestrator.models.folder import CHAT_TEMPLATE, TOKENIZER_CONFIG
from orchestrator.models.hub import is_hub_name, require_hub
from orchestrator.models.tokenizer import ModelTokenizer, tokenizer_path
from orchestrator.settings import DataSettings
from orchestrator.terminal.render import format_count
from orchestrator.workspace.errors import UserError, quoted, shortened
from orchestrator.workspace.files import expand_user
from orchestrator.workspace.provenance import content_key

PART_BYTES = 64 << 20
"""Files are divided into parts of about this size."""
DOCUMENT_MARK = "<|endoftext|>"
TITLE_CHARACTERS = 100
ASSUMED_BYTES_PER_DOCUMENT = 4000
"""Mean size of a document of the hub, assumed without a request."""
TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PLAIN_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
ASSUMED_COMPRESSION = 3
"""Bytes of text in a byte of other files."""
MAX_ENDINGS_SHOWN = 5
PACKAGES_TO_DECOMPRESS = {".zst": "zstandard", ".lz4": "lz4"}
"""Packages that the `datasets` library imports for compressed files."""
HOLDS_NUL = "it holds NUL bytes, so it is UTF-16 or no text at all; convert it to UTF-8 first"
"""The problem of a file that decodes: UTF-16 without a byte order mark can be valid UTF-8."""
PAIR = ("prompt", "completion")
"""Fields of a record that has no text."""


class RecordError(ValueError):
    """A record lacks the field with the text; the message says why and what to do, but not
    where."""


class Document(NamedTuple):
    """A text and where it comes from."""

    text: str
    source: str
    prompt_characters: int | None = None
    """Length of the prompt with which the text begins; None of a text that is learned whole."""

    @property
    def prompt(self) -> str:
        """The prompt, which is read but not learned; empty if everything is learned."""
        return self.text[: self.prompt_characters or 0]

    @property
    def completion(self) -> str:
        """The text that is learned: everything after the prompt."""
        return self.text[self.prompt_characters or 0 :]

    @property
    def deciding_text(self) -> str:
        """The text whose hash decides whether the document is held out: the prompt, if there is
        one, so that all completions of a prompt are on one side."""
        return self.prompt or self.text


class TextSource(ABC):
    """Base of all text sources, which read the section `data` of the settings."""

    version: ClassVar[int] = 1
    """Increase it if the same `state()` gives other documents; data are then prepared again."""

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings

    @abstractmethod
    def state(self) -> Any:
        """Return a JSON value that changes when the content does, such as sizes and times of files.

        The value and the settings are parts of the key of the prepared data. No content is read.

        Raises:
            UserError: If the source does not exist, or its settings do not fit together.
        """

    def parts(self) -> Sequence[Any]:
        """Return the parts of the source in their order, as JSON values; threads share them."""
        return [None]

    @abstractmethod
    def documents(self, part: Any, /) -> Iterator[Document]:
        """Yield the documents of a part as they are written, always in the same order.

        `data.validation_fraction` of the documents are held out, so a book should be cut into
        several documents by `data.passage_characters`.

        Raises:
            UserError: If the source cannot be read.
        """

    def num_bytes(self) -> int:
        """Estimate the bytes of text before they are read; 0 for a few megabytes at most."""
        return 0

    def _passages(self, text: str) -> Iterator[str]:
        """Yield a document, cut into passages if `data.passage_characters` is set."""
        if self.settings.passage_characters is None:
            yield text
        else:
            yield from split_long(text, self.settings.passage_characters)


class PythonTopics(TextSource):
    """The help topics that come with every Python: its reference manual, in English."""

    def state(self) -> Any:
        return ["pydoc topics", content_key(topics)]

    def documents(self, _part: Any, /) -> Iterator[Document]:
        names: dict[str, str] = {}  # Some topics have two names: `if` is also `else`.
        for name in sorted(topics):
            names.setdefault(topics[name], name)
        for text, name in names.items():
            for passage in self._passages(text):
                yield Document(passage, f"topics/{name}")


class TextFiles(TextSource):
    """The files that `data.files` names; a part is a list of pieces (path, first, end)."""

    version = 2

    def state(self) -> Any:
        files = {str(path): path for path in find_files(self.settings)}
        if self.settings.chat_template:  # Another template writes other texts.
            files |= _template_files(self.settings.tokenizer)
        return ["files", _stamps(files)]

    def parts(self) -> Sequence[Any]:
        parts: list[list[Any]] = []
        part_bytes = PART_BYTES  # As after a full part: the first piece begins a new one.
        for path in find_files(self.settings):
            for first, end, num_bytes in _pieces(path):
                if part_bytes >= PART_BYTES:
                    parts.append([])
                    part_bytes = 0
                parts[-1].append([str(path), first, end])
                part_bytes += num_bytes
        return parts

    def documents(self, part: Any) -> Iterator[Document]:
        for name, first, end in part:
            for document in read_file(Path(name), self.settings.text_field, first, end):
                if document.prompt_characters is None:
                    for passage in self._passages(document.text):
                        yield document._replace(text=passage)
                elif self._chat is None:
                    yield document
                else:
                    yield _as_chat(document, self._chat)

    @cached_property
    def _chat(self) -> ModelTokenizer | None:
        """The tokenizer whose chat template writes prompts and completions; None for plain text."""
        if not self.settings.chat_template:
            return None
        return ModelTokenizer(tokenizer_path(self.settings.tokenizer).parent)

    def num_bytes(self) -> int:
        return sum(
            path.stat().st_size * (1 if path.suffix in PLAIN_SUFFIXES else ASSUMED_COMPRESSION)
            for path in find_files(self.settings)
        )


class HubDataset(TextSource):
    """The data set `data.hub_name` of the hub, streamed; its parts are those of the data set."""

    version = 2

    def state(self) -> Any:
        state = ["hub", self._name, self.settings.hub_config]
        folder = Path(self._name)  # The hub's library also takes a folder of this machine.
        if not folder.is_dir():
            return state
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            package = PACKAGES_TO_DECOMPRESS.get(path.suffix)
            if package and find_spec(package) is None:
                raise UserError(f"{path} needs {package}; run `pip install {package}`")
        return [*state, _stamps({str(path.relative_to(folder)): path for path in files})]

    def parts(self) -> Sequence[Any]:
        return range(self._stream.num_shards)

    def documents(self, part: Any) -> Iterator[Document]:
        number = 0
        stream = self._stream
        try:
            for record in stream.shard(num_shards=stream.num_shards, index=part):
                number += 1
                text = record_text(record, self.settings.text_field)
                for passage in self._passages(text):
                    yield Document(passage, self._name)
        except RecordError as error:
            raise UserError(f"{self._name}, record {number} of part {part}: {error}") from None
        except Exception as error:  # The hub's client raises dozens of kinds.
            raise self._unreadable(error, f", part {part}, after record {number}") from None

    def num_bytes(self) -> int:
        return (self.settings.max_documents or 0) * ASSUMED_BYTES_PER_DOCUMENT

    @cached_property
    def _stream(self) -> Any:
        if not Path(self._name).is_dir():
            require_hub(f"the data set {self._name}")
        import datasets

        try:
            name, revision = self._name, None
            if not Path(name).is_dir():
                name, _, revision = name.partition("@")
            return datasets.load_dataset(
                name,
                self.settings.hub_config,
                split="train",
                streaming=True,
                revision=revision or None,
            )
        except Exception as error:  # The hub's client raises dozens of kinds.
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception, place: str = "") -> UserError:
        reason = " ".join(str(error).split())
        return UserError(f"cannot read the data set {self._name}{place}: {reason}")

    @property
    def _name(self) -> str:
        """The name of the data set; a `UserError` if the settings have none."""
        if not self.settings.hub_name:
            raise UserError(
                "the source `hub` reads data.hub_name, which is empty; name a data set, such as "
                "--set data.hub_name=cerebras/SlimPajama-627B"
            )
        return self.settings.hub_name


def _stamps(files: Mapping[str, Path]) -> list[Any]:
    """Return a list that changes when one of the files does: names, sizes and times."""
    stamps: list[Any] = []
    for name, path in files.items():
        status = path.stat()
        stamps.append([name, status.st_size, status.st_mtime_ns])
    return stamps


_SOURCES: Mapping[str, type[TextSource]] = {
    "python": PythonTopics,
    "files": TextFiles,
    "hub": HubDataset,
}


def text_source(settings: DataSettings) -> TextSource:
    """Return the text source that the settings name."""
    return _SOURCES[settings.source](settings)


def source_state(settings: DataSettings) -> Any:
    """Return a JSON value that changes when the source's content does; reads no content.

    Raises:
        UserError: If the files do not exist, or the settings name no source.
    """
    source = text_source(settings)
    return [source.version, source.state()]


def read_documents(source: TextSource, part: Any) -> Iterator[Document]:
    """Yield the documents of a part that are not empty, as valid UTF-8.

    Texts are stripped, except for spaces between a prompt and its completion.

    Raises:
        UserError: If a file is missing, unreadable or of an unknown kind, `text_field` is wrong, or
            the hub cannot be reached.
    """
    for document in source.documents(part):
        is_pair = document.prompt_characters is not None
        text = document.text if is_pair else document.text.strip()
        # JSON allows lone surrogates, which UTF-8 does not; each is replaced by one character.
        if utf8 := text.encode("utf-8", "replace"):
            yield document._replace(text=utf8.decode("utf-8"))


# Files


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
    all_files: set[Path] = set()
    kinds = ", ".join(SUFFIXES)
    for pattern in settings.files:
        if not pattern:
            raise UserError("data.files: a name is empty; name a file, a folder or a pattern")
        path = Path.cwd() / expand_user(pattern)
        problem = f"no file matches {quoted(pattern)} (searched from {Path.cwd()})"
        try:
            if path.is_dir():
                matches = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES)]
                problem = f"the folder {path} holds no text; the kinds are {kinds}"
            elif path.is_file():  # Taken literally, even with brackets in its name.
                matches = [path]
            else:
                root = Path(path.anchor)
                matches = list(root.glob(str(path.relative_to(root))))
            files = [match.resolve() for match in matches if match.is_file()]
        except (OSError, ValueError) as error:
            files = []
            problem = f"{quoted(pattern)} is not a valid path or file pattern ({error})"
        if not files:
            raise UserError(f"data.files: {problem}")
        for file in files:
            if not file.name.endswith(SUFFIXES):
                raise UserError(f"data.files: cannot read {file}; the kinds are {kinds}")
        all_files.update(files)
    return sorted(all_files)


def unread_note(settings: DataSettings) -> str | None:
    """Return which files in the folders of `data.files` are not read because of their endings.

    None if all are read. Hidden files do not count.

    Raises:
        UserError: If a file or folder does not exist.
    """
    if settings.source == "mixture" and "files" in settings.texts:
        settings = settings.texts["files"]
    if settings.source != "files":
        return None
    read = set(find_files(settings))
    unread: set[Path] = set()
    for pattern in settings.files:
        folder = Path.cwd() / expand_user(pattern)
        for file in folder.rglob("*") if folder.is_dir() else ():
            is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if file.is_file() and not is_hidden and file.resolve() not in read:
                unread.add(file.resolve())
    if not unread:
        return None
    num_by_ending = Counter(file.suffix or "without an ending" for file in unread)
    by_number = sorted(num_by_ending.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{name} {number:,}" for name, number in by_number[:MAX_ENDINGS_SHOWN]]
    if len(num_by_ending) > MAX_ENDINGS_SHOWN:
        shown.append("...")
    files = format_count(len(unread), "other file is", "other files are")
    return f"{files} not read ({', '.join(shown)})"


def _pieces(path: Path) -> Iterator[tuple[int, int | None, int]]:
    """Yield the pieces of a file that threads can read separately: first, end and bytes.

    First and end count the bytes of a `.jsonl` file, or the row groups of a `.parquet` file. An end
    of None is the end of the file: other kinds can only be read from their beginning.
    """
    size = path.stat().st_size
    if path.suffix == ".jsonl":
        for first in range(0, max(1, size), PART_BYTES):
            yield first, first + PART_BYTES, min(PART_BYTES, size - first)
    elif path.suffix == ".parquet" and size > PART_BYTES:
        metadata = _parquet(path).metadata
        for group in range(metadata.num_row_groups):
            yield group, group + 1, metadata.row_group(group).total_byte_size
    else:
        yield 0, None, size


def read_file(
    path: Path, text_field: str, first: int = 0, end: int | None = None
) -> Iterator[Document]:
    """Yield the documents of one file, or of those lines or row groups that begin in a range.

    Args:
        path: A file of one of the `SUFFIXES`.
        text_field: The field of a record that holds the text.
        first: Byte of a `.jsonl` file, or row group of a `.parquet` file, with which the range
            begins.
        end: End of the range, exclusive; None for the end of the file.

    Raises:
        UserError: If the file cannot be read, is not UTF-8 text, or a record has no `text_field`;
            names the file, and the line or the row.
    """
    # Position and content of the current line, for errors.
    position = first
    line = b""
    try:
        if path.suffix in TEXT_SUFFIXES:
            text = path.read_text(encoding="utf-8-sig")
            if "\0" in text:
                raise RecordError(HOLDS_NUL)
            for document in split_text_file(text):
                yield Document(document, path.name)
        elif path.suffix == ".parquet":
            for text in _read_parquet(path, text_field, first, end):
                yield Document(text, path.name)
        else:
            for position, line in _read_lines(path, first, end):
                # Only the beginning of a file can have a byte-order mark.
                record = json.loads(line.decode("utf-8" if position else "utf-8-sig"))
                yield _record_document(record, text_field, path.name)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        place = f", line {_line_number(path, position)}" if line else ""
        raise UserError(f"{path}{place}: {_problem(error, line)}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _read_lines(path: Path, first: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    with _open_lines(path) as file:
        position = first
        # A line belongs to the range in which it begins. From one byte before the range, the rest
        # of the earlier line is read: only its end if a line begins exactly at `first`.
        if first:
            file.seek(first - 1)
            position += len(file.readline()) - 1
        for line in file:
            if end is not None and position >= end:
                return
            if line.strip():
                yield position, line
            position += len(line)


def _open_lines(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if path.suffix == ".zst":
        import pyarrow  # Unlike zstandard's own reader, its reader notices a cut file.

        stream = pyarrow.input_stream(path, compression="zstd")
        return io.BufferedReader(stream)
    return path.open("rb")


def _line_number(path: Path, position: int) -> int:
    # Read again only for an error: counting lines always would cost time.
    number = 1
    with _open_lines(path) as file:
        while position > 0 and (block := file.read(min(position, 1 << 20))):
            number += block.count(b"\n")
            position -= len(block)
    return number


def _problem(error: Exception, line: bytes = b"") -> str:
    if b"\0" in line:
        return HOLDS_NUL
    if isinstance(error, UnicodeDecodeError):
        return f"this is not UTF-8 text (byte {error.start}); convert it first"
    if isinstance(error, json.JSONDecodeError | RecursionError):
        return "this is not JSON; each line holds one object"
    return str(error)


def _parquet(path: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None


def _read_parquet(path: Path, text_field: str, first: int, end: int | None) -> Iterator[str]:
    import pyarrow

    file = _parquet(path)
    # Raises if there is no such column, with a record of empty texts as an example.
    record_text(dict.fromkeys(file.schema_arrow.names, ""), text_field)
    groups = range(first, file.num_row_groups if end is None else end)
    row = sum(file.metadata.row_group(group).num_rows for group in range(first))
    try:
        for batch in file.iter_batches(row_groups=groups, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield record_text({text_field: "" if text is None else text}, text_field)
    except (RecordError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}, row {row}: {error}") from None


def _record_document(record: Any, text_field: str, source: str) -> Document:
    """Return the document of a record: its text, or its prompt with its completion."""
    is_pair = isinstance(record, dict) and text_field not in record and {*PAIR} <= record.keys()
    if not is_pair:
        return Document(record_text(record, text_field), source)
    prompt = record_text(record, "prompt")
    completion = record_text(record, "completion")
    if not completion.strip():
        raise RecordError("the field 'completion' is empty; write what is to be learned")
    return Document(prompt + completion, source, len(prompt))


def _as_chat(document: Document, tokenizer: ModelTokenizer) -> Document:
    """Return a prompt with its completion as question and answer in a chat template.

    Raises:
        UserError: If the model has no template, or the template does not end with the answer.
    """
    question = [{"role": "user", "content": document.prompt}]
    answer = {"role": "assistant", "content": document.completion}
    opening = tokenizer.chat(question)
    text = tokenizer.chat([*question, answer], opens_answer=False)
    if not text.startswith(opening):
        raise UserError(
            "data.chat_template=true: the chat template of data.tokenizer writes a question in "
            "another way when an answer follows; leave it out, and write prompts as the model "
            "reads them"
        )
    return Document(text, document.source, len(opening))


def _template_files(tokenizer: str) -> dict[str, Path]:
    """Return the local files that may hold the chat template of `data.tokenizer`.

    Raises:
        UserError: If the tokenizer is to be trained, so that it has no chat template.
    """
    if tokenizer == "train":
        raise UserError(
            "data.chat_template=true needs data.tokenizer, the folder of a model with a chat "
            "template; a trained tokenizer has none"
        )
    if is_hub_name(tokenizer):
        return {}
    path = expand_user(tokenizer)
    folder = path if path.is_dir() else path.parent
    files = {name: folder / name for name in (TOKENIZER_CONFIG, CHAT_TEMPLATE)}
    return {name: file for name, file in files.items() if file.is_file()}


def record_text(record: Any, text_field: str) -> str:
    """Return the text of a record.

    Raises:
        RecordError: If the record is not an object, or the field is missing or holds no text.
    """
    if not isinstance(record, dict):
        raise RecordError(
            f"{shortened(json.dumps(record))} is not an object with a field {text_field!r}"
        )
    if text_field not in record:
        raise RecordError(
            f"there is no field {text_field!r} but {', '.join(map(repr, record)) or 'none at all'};"
            " correct it, or name the field with the text by --set data.text_field=NAME; lines of "
            "JSON may have 'prompt' and 'completion' instead"
        )
    text = record[text_field]
    if not isinstance(text, str):
        shown = shortened(json.dumps(text, default=str))
        raise RecordError(
            f"the field {text_field!r} holds {shown}, which is not text; correct it or remove it"
        )
    return text


def split_text_file(text: str) -> list[str]:
    """Return the documents of a file of text; see the module's docstring for the rule."""
    text = text.replace("\r\n", "\n")
    if DOCUMENT_MARK in text:
        return text.split(DOCUMENT_MARK)
    blocks = [block.strip().split("\n") for block in text.split("\n\n") if block.strip()]
    titled = [block for block in blocks if len(block) > 1 and len(block[0]) <= TITLE_CHARACTERS]
    # A file has titled documents if nearly all blocks begin with a short line: in hard-wrapped
    # paragraphs, the first line is as long as the others.
    if len(blocks) > 2 and len(titled) >= 0.9 * len(blocks):
        title_length = median(len(block[0]) for block in titled)
        line_length = median(max(map(len, block[1:])) for block in titled)
        if title_length < 0.6 * line_length:
            return ["\n".join(block) for block in blocks]
    return [text]


def split_long(text: str, passage_characters: int) -> Iterator[str]:
    """Yield the passages of a document; one of at most twice `passage_characters` is not cut.

    A passage ends at the first end of a paragraph after `passage_characters`.
    """
    if len(text) <= 2 * passage_characters:
        yield text
        return
    separator = "\n\n" if "\n\n" in text else "\n"
    passage: list[str] = []
    size = 0
    for paragraph in text.split(separator):
        passage.append(paragraph)
        size += len(paragraph) + len(separator)
        if size >= passage_characters:
            yield separator.join(passage)
            passage = []
            size = 0
    if passage:
        yield separator.join(passage)
