"""Documents from files of every kind, and a clear error for each file that cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from orchestrator.data.corpus import read_documents
from orchestrator.data.text_files import (
    PASSAGE_CHARACTERS,
    find_files,
    split_long,
    split_text_file,
)
from orchestrator.settings import DataSettings
from orchestrator.workspace.errors import UserError

SHARED_TEXT = Path(__file__).resolve().parents[4] / "shared" / "data" / "text"


def files(*names: Path | str, **more: Any) -> DataSettings:
    return DataSettings(source="files", files=tuple(map(str, names)), **more)


def texts(settings: DataSettings) -> list[str]:
    return [document.text for document in read_documents(settings)]


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [{"body": f"Document {i} has its own words."} for i in range(3)]
    expected = [row["body"] for row in rows]
    lines = "\ufeff" + "\n".join(map(json.dumps, rows))  # Windows starts files with such a mark.
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(expected))
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert texts(files(tmp_path / name, text_field="body")) == expected, name
    # All files together hold the same three texts, which count once.
    assert texts(files(tmp_path / "a.*", text_field="body")) == expected
    assert texts(files(tmp_path / "a.*", text_field="body", max_documents=2)) == expected[:2]


def test_titled_blocks_are_documents_and_a_book_is_one() -> None:
    titled = "\n\n".join(f"Title {i}\n{'A long line of text about it. ' * 4}" for i in range(5))
    assert len(split_text_file(titled)) == 5
    wrapped = "\n\n".join("This line is as long\nas all of the others\nin it" for _ in range(5))
    assert split_text_file(wrapped) == [wrapped]
    plain = "\n\n".join("One paragraph on one line." for _ in range(5))
    assert split_text_file(plain) == [plain]


def test_a_book_is_split_at_paragraph_ends() -> None:
    book = "\n\n".join(f"{i}: " + "word " * 200 for i in range(40))
    passages = list(split_long(book))
    assert "\n\n".join(passages) == book
    assert len(passages) > 5
    assert all(len(p) < 2 * PASSAGE_CHARACTERS for p in passages)
    assert list(split_long("short")) == ["short"]


def test_an_existing_name_with_brackets_is_not_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("Text.")
    assert find_files(files(tmp_path / "a[1].txt")) == [tmp_path / "a[1].txt"]


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"tex', "text", "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', "text", "no field 'text' but 'body'"),
        ("a.jsonl", b'{"text": 5}', "text", "holds a number, not text"),
        ("a.jsonl", b'{"text": null}', "text", r"line 1: .* holds nothing \(null\), not text"),
        ("a.jsonl", b'{"text": true}', "text", "holds true or false, not text"),
        ("a.jsonl", b'["x"]', "text", "holds a list"),
        ("a.jsonl", b"null", "text", r"holds nothing \(null\), not an object"),
        ("a.jsonl", b"[" * 100_000, "text", "line 1 is not JSON"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-le"), "text", "holds NUL bytes.*UTF-16"),
        ("a.txt", "A text.".encode("utf-16-le"), "text", "holds NUL bytes.*convert it to UTF-8"),
        ("a.txt", "A text.".encode("utf-16-be"), "text", "holds NUL bytes"),
        ("a.jsonl.gz", b"not gzip", "text", "cannot read"),
        ("a.jsonl.zst", b"not zstd", "text", "cannot read"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n')[:-6], "text", "cannot read"),
        ("a.parquet", b"not parquet", "text", "not a readable Parquet file"),
        ("a.txt", b"\xff\xfe\x00", "text", "not UTF-8"),
        ("a.csv", b"a,b", "text", "the kinds are .txt"),
    ],
)
def test_an_unreadable_file_is_a_clear_error(
    tmp_path: Path, name: str, content: bytes, field: str, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_documents(files(tmp_path / name, text_field=field)))


@pytest.mark.parametrize("odd", [0, 30, 49])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_one_line_without_the_field_is_reported_as_that_line(
    tmp_path: Path, odd: int, suffix: str
) -> None:
    rows = [json.dumps({"text" if n != odd else "txet": f"text {n}"}) for n in range(50)]
    path = tmp_path / f"a{suffix}"
    with (gzip.open if suffix.endswith("gz") else open)(path, "wt") as file:
        file.write("\n".join(rows))
    with pytest.raises(UserError) as caught:
        list(read_documents(files(path)))
    assert f"{path}, line {odd + 1} has no field 'text', but 49 of the first 50 lines have it" in (
        str(caught.value)
    )
    assert "data.text_field" not in str(caught.value)


def test_a_folder_means_all_text_files_below_it(tmp_path: Path) -> None:
    (tmp_path / "corpus" / "deeper").mkdir(parents=True)
    (tmp_path / "corpus" / "a.txt").write_text("One text.")
    (tmp_path / "corpus" / "deeper" / "b.jsonl").write_text('{"text": "Another text."}')
    (tmp_path / "corpus" / "notes.md").write_text("No text of the corpus.")
    assert texts(files(tmp_path / "corpus")) == ["One text.", "Another text."]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder .*empty holds no text; the kinds are"):
        find_files(files(tmp_path / "empty"))


@pytest.mark.parametrize("pattern", ["", "a**b", "x" * 5000, "~no-such-user/a.txt", "a\0b.txt"])
def test_an_invalid_path_is_a_clear_error(pattern: str) -> None:
    with pytest.raises(UserError, match=r"data\.files|cannot use the path"):
        find_files(files(pattern))


def test_a_missing_parquet_column_lists_the_columns(tmp_path: Path) -> None:
    table = pyarrow.table({"body": ["x"], "id": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="'body', 'id'"):
        list(read_documents(files(tmp_path / "a.parquet")))


@pytest.mark.skipif(not SHARED_TEXT.is_dir(), reason="no sample texts beside the repository")
def test_real_books_and_articles() -> None:
    documents = read_documents(files(SHARED_TEXT / "*.txt"))
    by_source = dict.fromkeys(("wikipedia_vital.txt", "tom_sawyer.txt"), 0)
    for document in documents:
        if document.source in by_source:
            by_source[document.source] += 1
    assert by_source["wikipedia_vital.txt"] > 9000
    assert 50 < by_source["tom_sawyer.txt"] < 200
