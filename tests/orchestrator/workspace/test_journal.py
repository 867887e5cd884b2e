"""A journal is readable from any position and after a copy; keys depend on content alone."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from refusals import assert_names

from orchestrator.workspace.journal import (
    JOURNAL_NAME,
    Journal,
    JournalReader,
    last_recorded,
    read_journal,
    read_metrics,
)
from orchestrator.workspace.layout import open_workspace
from orchestrator.workspace.provenance import content_key, file_key


def test_records_are_read_from_any_offset_and_the_last_one_has_the_time(tmp_path):
    assert read_journal(tmp_path / "nothing") == ([], 0)
    os.utime(tmp_path, (7, 7))
    assert last_recorded(tmp_path) == 7
    run = tmp_path / "run"
    journal = Journal(run)
    journal.metrics(1, {"loss": 2.5})
    first, offset = read_journal(run)
    before = time.time()
    journal.event("checkpoint", step=1, text="x" * 100_000)
    second, end = read_journal(run, offset)
    journal.event("finished")
    journal.close()
    assert [r["values"] for r in first] == [{"loss": 2.5}]
    assert [(r["name"], r["step"]) for r in second] == [("checkpoint", 1)]
    assert [r["name"] for r in read_journal(run, end)[0]] == ["finished"]
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    os.utime(copy, (7, 7))
    assert before - 0.01 < last_recorded(copy) == last_recorded(run) <= time.time()


def test_events_of_a_journal_name_files_relative_to_the_workspace(tmp_path):
    run = open_workspace(tmp_path).runs / "toy"
    journal = Journal(run)
    journal.event("resumed", step=3, path=f"{run}/step_3")
    journal.event("damaged", text=f"{run}/step_4 is damaged; {run}/step_3 is used")
    journal.close()
    assert str(tmp_path) not in journal.path.read_text()
    resumed, damaged = read_journal(run)[0]
    assert (resumed["step"], resumed["path"]) == (3, "runs/toy/step_3")
    assert_names(damaged["text"], "runs/toy/step_4", "runs/toy/step_3")
    outside = Journal(tmp_path.parent / f"{tmp_path.name}-outside")
    outside.event("resumed", path="/a/b")
    outside.close()
    assert json.loads(outside.path.read_text())["path"] == "/a/b"


def test_keys_depend_on_content_alone(tmp_path):
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    first = tmp_path / "one"
    second = tmp_path / "two"
    first.write_bytes(b"x" * 3_000_000)
    second.write_bytes(b"x" * 3_000_000)
    assert file_key(first) == file_key(second)
    second.write_bytes(b"x" * 2_999_999 + b"y")
    assert file_key(first) != file_key(second)


def test_a_journal_is_opened_only_when_it_has_grown(tmp_path, monkeypatch):
    opened = list[str]()
    open_path = Path.open

    def counted_open(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path.name)
        return open_path(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", counted_open)
    reader = JournalReader(tmp_path)
    assert reader.read() == []
    journal = Journal(tmp_path)
    journal.metrics(1, {"train/loss": 2.0})
    opened.clear()
    assert [record["step"] for _ in range(5) for record in reader.read()] == [1]
    journal.metrics(2, {"train/loss": 1.0})
    assert [record["step"] for _ in range(5) for record in reader.read()] == [2]
    journal.close()
    assert opened == [JOURNAL_NAME, JOURNAL_NAME]
    assert reader.step == 2
    # Another reader begins where this one stopped, and numbers are read by step.
    journal = Journal(tmp_path)
    journal.metrics(2, {"train/loss": 0.9})
    journal.close()
    later = JournalReader(tmp_path, reader.offset)
    assert [record["values"] for record in later.read()] == [{"train/loss": 0.9}]
    assert dict(read_metrics(tmp_path)) == {1: {"train/loss": 2.0}, 2: {"train/loss": 0.9}}
