"""Documents of each source and kind of file, in parts, and what a user is told about bad ones."""

from __future__ import annotations

import gzip
import json
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from refusals import refused
from sample_texts import lines_of

from orchestrator.data import text
from orchestrator.data.preparation import source_key
from orchestrator.data.store import open_tokens
from orchestrator.data.text import (
    find_files,
    read_documents,
    source_state,
    split_text_file,
    text_source,
)
from orchestrator.data.text_parts import thread_runner
from orchestrator.data.tokenize import write_text
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError

WORDS = "the quick brown fox jumps over the lazy dog and runs away from it again "


def files(*names: Path | str, **options: Any) -> DataSettings:
    return DataSettings(source="files", files=tuple(map(str, names)), **options)


def hub(name: Path | str, **options: Any) -> DataSettings:
    return DataSettings(source="hub", hub_name=str(name), **options)


def texts(settings: DataSettings) -> list[str]:
    source = text_source(settings)
    parts = (read_documents(source, part) for part in source.parts())
    return [document.text for document in chain.from_iterable(parts)]


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    rows = [{"body": f"Document {i} has its own words."} for i in range(3)]
    expected = [row["body"] for row in rows]
    lines = "\ufeff" + "\n".join(map(json.dumps, rows))  # Windows starts files with such a mark.
    (tmp_path / "a.txt").write_text("\ufeff" + "<|endoftext|>".join(expected))
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.md", "a.rst"):
        (tmp_path / name).write_text("<|endoftext|>".join(expected))
    for name in ("a.txt", "a.md", "a.rst", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert texts(files(tmp_path / name, text_field="body")) == expected, name
    (tmp_path / "b.jsonl").write_text('{"text": " bad \\ud800 half "}\n{"text": " "}')
    assert texts(files(tmp_path / "b.jsonl")) == ["bad ? half"]


def test_parts_of_any_size_hold_the_same_documents(tmp_path, monkeypatch):
    expected = [f"Text {i} says {'fish ' * (i % 7)}." for i in range(40)]
    rows = [{"text": line} for line in expected]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows[:20])) + "\n")
    table = pyarrow.Table.from_pylist(rows[20:30])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=3)
    (tmp_path / "c.txt").write_text("<|endoftext|>".join(expected[30:]))
    settings = files(tmp_path)
    for part_bytes in (1, 37, 100, 500):
        monkeypatch.setattr(text, "PART_BYTES", part_bytes)
        assert len(text_source(settings).parts()) > 2
        assert texts(settings) == expected
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n' * 100 + '{"text": "cut\n')
    with refused(UserError, "d.jsonl, line 101", "JSON"):
        texts(settings)


def test_titled_blocks_are_documents_and_a_book_is_cut_at_paragraph_ends_if_asked(tmp_path):
    titled = "\n\n".join(f"Title {i}\n{'A long line of text about it. ' * 4}" for i in range(5))
    assert len(split_text_file(titled)) == 5
    wrapped = "\n\n".join("This line is as long\nas all of the others\nin it" for _ in range(5))
    assert split_text_file(wrapped) == [wrapped]
    plain = "\n\n".join("One paragraph on one line." for _ in range(5))
    assert split_text_file(plain) == [plain]
    book = "\n\n".join(f"{i}:" + " word" * 200 for i in range(40))
    (tmp_path / "book.txt").write_text(book)
    assert texts(files(tmp_path)) == [book], "a long document stays whole"
    passages = texts(files(tmp_path, passage_characters=4000))
    assert "\n\n".join(passages) == book
    assert len(passages) > 5
    assert all(len(passage) < 8000 for passage in passages)
    assert len(texts(files(tmp_path, passage_characters=len(book)))) == 1


def test_names_folders_and_patterns(tmp_path):
    (tmp_path / "corpus" / "deeper").mkdir(parents=True)
    for name in ("a[1].txt", "deeper/b.jsonl", "notes.html"):
        (tmp_path / "corpus" / name).write_text(f'{{"text": "{name}"}}')
    first = tmp_path / "corpus" / "a[1].txt"
    second = tmp_path / "corpus" / "deeper" / "b.jsonl"
    assert find_files(files(first)) == [first], "a file with brackets is not a pattern"
    assert find_files(files(tmp_path / "corpus")) == [first, second]
    assert find_files(files(tmp_path / "*" / "*" / "b*", first)) == [first, second]
    before = source_state(files(first))
    first.write_text("Another text.")
    assert source_state(files(first)) != before


WRONG_PATHS = {
    "": "a name is empty",
    "a**b": r"data\.files",
    "~no-such-user/a.txt": "cannot use the path",
    "a\0b.txt": r"data\.files",
    "nothing/*.txt": "no file matches",
    ".": r"the folder .* holds no text; the kinds are \.txt",
    __file__: r"cannot read .*test_text\.py; the kinds are \.txt",
}
BAD_FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b'{"text": "x"}\n\n{"tex', r"a\.jsonl, line 3: this is not JSON"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', "line 2: there is no field 'text' but"),
    ("a.jsonl", b'{"text": 5}', "line 1: the field 'text' holds 5, which is not text"),
    ("a.jsonl", b'["x"]', "is not an object with a field 'text'"),
    ("a.jsonl", b"[" * 100_000, "line 1: this is not JSON"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "line 2: this is not UTF-8 text"),
    ("a.jsonl", '{"text": "x"}'.encode("utf-16-le"), "NUL bytes.*UTF-16"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n[]'), r"\.gz, line 2: \[\] is not an"),
    ("a.jsonl.gz", b"not gzip", r"cannot read .*a\.jsonl\.gz"),
    ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n')[:-6], "cannot read"),
    ("a.txt", "A text.".encode("utf-16-be"), "NUL bytes.*convert it to UTF-8"),
    ("a.txt", b"\xff\xfe", r"a\.txt: this is not UTF-8 text \(byte 0\)"),
    ("a.parquet", b"not parquet", "not a readable Parquet file"),
]


def test_a_wrong_path_and_a_bad_file_are_named_with_the_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for pattern, message in WRONG_PATHS.items():
        with pytest.raises(UserError, match=message):
            find_files(files(pattern))
    for name, content, message in BAD_FILES:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            texts(files(tmp_path / name))


# The hub, and folders that its library reads


@pytest.mark.slow
def test_a_data_set_is_opened_once_however_many_parts_it_has(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "set").mkdir()
    for part in range(6):
        rows = [{"text": f"Document {number} of {part}. {WORDS}"} for number in range(10)]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, tmp_path / "set" / f"{part}.parquet")
    openings = []
    load_dataset = datasets.load_dataset

    def counting(*arguments: Any, **options: Any) -> Any:
        openings.append(arguments)
        return load_dataset(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", counting)
    settings = hub(tmp_path / "set", vocab_size=300, validation_fraction=0.3)
    in_threads = {"open_runner": partial(thread_runner, 3)}
    folder = write_text(settings, tmp_path / "tokens", "key", Progress(), **in_threads)
    of_files = settings.model_copy(
        update={"source": "files", "files": (str(tmp_path / "set"),), "hub_name": ""}
    )
    assert len(openings) == 1
    expected = write_text(of_files, tmp_path / "of files", "key", Progress(), **in_threads)
    assert open_tokens(folder).train[:].tolist() == open_tokens(expected).train[:].tolist()
    assert (folder / "validation.bin").read_bytes() == (expected / "validation.bin").read_bytes()


@pytest.mark.slow
def test_a_data_set_is_streamed_file_by_file(tmp_path):
    for part in range(3):
        lines = lines_of(f"Document {number} of {part}. {WORDS}" for number in range(50))
        (tmp_path / f"{part}.jsonl").write_text(lines)
    assert len(text_source(hub(tmp_path)).parts()) == 3
    assert texts(hub(tmp_path)) == texts(files(tmp_path / "*.jsonl"))


def test_a_data_set_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    with refused(UserError, "set", "record 1 of part 0", "'body'"):
        texts(hub(tmp_path / "set", text_field="body"))
    (tmp_path / "set" / "a.jsonl").write_text('{"text": "x"}\n{"te')
    with refused(UserError, "set"):
        texts(hub(tmp_path / "set"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused(UserError, "some/name", "data.source=files"):
        texts(hub("some/name"))
    with pytest.raises(UserError, match=r"^the data set some/name needs the hub"):
        # A process that did not list the parts.
        next(text_source(hub("some/name")).documents(0))
    with refused(UserError, "data.hub_name"):
        texts(hub(""))
    with refused(UserError, "data.files"):
        texts(files())


@pytest.mark.slow
def test_a_revision_of_a_data_set_is_read_and_is_part_of_its_key(monkeypatch):
    import datasets  # Takes a second.

    asked: list[tuple[str, str | None]] = []

    def load(name: str, *_: Any, revision: str | None, **__: Any) -> Any:
        asked.append((name, revision))
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": WORDS}]))

    monkeypatch.setenv("HTTPS_PROXY", "http://none.invalid")  # The hub is not probed.
    monkeypatch.setattr(datasets, "load_dataset", load)
    names = ("me/texts", "me/texts@v1", "me/texts@v2")
    for name in names:
        assert texts(hub(name)) == [WORDS.strip()]
    assert asked == [("me/texts", None), ("me/texts", "v1"), ("me/texts", "v2")]
    assert len({source_key(hub(name)) for name in names}) == 3


def test_help_topics_need_no_network():
    topics = texts(DataSettings(source="python"))
    assert len(topics) > 50
    assert len(set(topics)) == len(topics), "a topic of two names is one document"
    assert sum(map(len, topics)) > 300_000
    assert len(texts(DataSettings(source="python", passage_characters=4000))) > len(topics) + 50
    state = source_state(DataSettings(source="python"))
    assert state == source_state(DataSettings(source="python"))
