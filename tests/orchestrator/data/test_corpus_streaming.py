"""A corpus larger than memory is streamed by `datasets` and tokenized without being held."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from orchestrator.data.corpus import read_documents
from orchestrator.data.store import open_tokens
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


def peak_memory(folder: Path) -> tuple[int, int, int]:
    """Stream a data set; return its documents, and the peak bytes of Python and Arrow."""
    pool = pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    arrow_peak = count = 0
    tracemalloc.start()
    try:
        for _ in read_documents(DataSettings(source="hub", hub_name=str(folder))):
            count += 1
            arrow_peak = max(arrow_peak, pool.bytes_allocated() - before)
        _, python_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return count, python_peak, arrow_peak


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_memory_does_not_grow_with_the_data_set(tmp_path: Path, kind: str) -> None:
    for num_files in (1, 2, 5):
        write_folder(tmp_path / str(num_files), kind, num_files)
    peak_memory(tmp_path / "1")  # imports and caches of the first use
    small, large = (peak_memory(tmp_path / str(n)) for n in (2, 5))
    assert (small[0], large[0]) == (2 * DOCUMENTS_PER_FILE, 5 * DOCUMENTS_PER_FILE)
    # About 100 bytes of each document are kept, to recognize equal ones; its text has 3,000.
    more = large[1] - small[1]
    assert more < 300 * 3 * DOCUMENTS_PER_FILE
    assert large[2] < 1.5 * small[2] + 1e6


def test_a_data_set_and_its_files_give_the_same_tokens(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", "jsonl", 1)
    common = {"vocab_size": 300, "max_documents": 300}
    streamed = DataSettings(source="hub", hub_name=str(tmp_path / "set"), **common)
    read = DataSettings(source="files", files=(str(tmp_path / "set" / "*.jsonl"),), **common)
    stores = [
        open_tokens(
            write_tokens(
                tmp_path / settings.source, read_documents(settings), settings, resume_key="a key"
            )
        )
        for settings in (streamed, read)
    ]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert (stores[0].train == stores[1].train).all()
