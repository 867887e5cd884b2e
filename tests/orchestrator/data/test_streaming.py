"""A corpus larger than memory passes through: streamed by `datasets`, tokenized, never held."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from orchestrator.data.corpus import read_documents
from orchestrator.data.token_store import open_tokens
from orchestrator.data.tokenization import write_tokens
from orchestrator.settings import DataSettings

WORDS = "the quick brown fox jumps over the lazy dog and runs away from it again "
DOCUMENTS_PER_FILE = 1000


def write_folder(folder: Path, kind: str, num_files: int) -> None:
    """Write a data set of several files, 3 MB each."""
    folder.mkdir()
    for part in range(num_files):
        first = part * DOCUMENTS_PER_FILE
        numbers = range(first, first + DOCUMENTS_PER_FILE)
        rows = [{"text": f"Document {number}. " + WORDS * 40} for number in numbers]
        if kind == "parquet":
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, folder / f"{part}.parquet")
        else:
            lines = "\n".join(json.dumps(row) for row in rows)
            (folder / f"{part}.jsonl").write_text(lines + "\n")


def largest_memory(folder: Path) -> tuple[int, int, int]:
    """Stream a data set; return its documents, and the most bytes that Python and Arrow held."""
    pool = pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    arrow_most = count = 0
    tracemalloc.start()
    try:
        for _ in read_documents(DataSettings(source="hub", hub_name=str(folder))):
            count += 1
            arrow_most = max(arrow_most, pool.bytes_allocated() - before)
        _, python_most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return count, python_most, arrow_most


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_streamed_data_set_takes_the_memory_of_a_part_of_it(tmp_path: Path, kind: str) -> None:
    for num_files in (1, 2, 5):
        write_folder(tmp_path / str(num_files), kind, num_files)
    largest_memory(tmp_path / "1")  # what is imported and cached on first use
    small, large = (largest_memory(tmp_path / str(n)) for n in (2, 5))
    assert (small[0], large[0]) == (2 * DOCUMENTS_PER_FILE, 5 * DOCUMENTS_PER_FILE)
    # A hash of each document is kept, to count equal ones once: some 100 bytes. 3,000 are its text.
    more = large[1] - small[1]
    assert more < 300 * 3 * DOCUMENTS_PER_FILE
    assert large[2] < 1.5 * small[2] + 1e6


def test_a_data_set_gives_the_tokens_that_its_files_give(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", "jsonl", 1)
    common = {"vocab_size": 300, "max_documents": 300}
    streamed = DataSettings(source="hub", hub_name=str(tmp_path / "set"), **common)
    read = DataSettings(source="files", files=(str(tmp_path / "set" / "*.jsonl"),), **common)
    stores = [
        open_tokens(write_tokens(tmp_path / settings.source, read_documents(settings), settings))
        for settings in (streamed, read)
    ]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert (stores[0].train == stores[1].train).all()
