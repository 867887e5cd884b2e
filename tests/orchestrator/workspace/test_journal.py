"""A journal is readable from any position, also after a crash."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

from orchestrator.workspace.journal import Journal, last_recorded, read_journal
from orchestrator.workspace.layout import open_workspace


def test_records_are_read_from_any_offset(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.metrics(1, {"loss": 2.5})
    first, offset = read_journal(tmp_path)
    journal.event("checkpoint", step=1)
    second, end = read_journal(tmp_path, offset)
    journal.close()
    assert [r["values"] for r in first] == [{"loss": 2.5}]
    assert [(r["name"], r["step"]) for r in second] == [("checkpoint", 1)]
    assert read_journal(tmp_path, end) == ([], end)


def test_a_missing_journal_is_empty(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "nothing") == ([], 0)


def test_the_time_of_the_last_record_survives_a_copy(tmp_path: Path) -> None:
    os.utime(tmp_path, (7, 7))
    assert last_recorded(tmp_path) == 7
    journal = Journal(tmp_path / "run")
    journal.event("started", text="x" * 100_000)
    before = time.time()
    journal.event("finished")
    journal.close()
    copy = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    os.utime(copy, (7, 7))
    assert before - 0.01 < last_recorded(copy) == last_recorded(tmp_path / "run") <= time.time()


def test_events_of_a_journal_name_files_relative_to_the_workspace(tmp_path: Path) -> None:
    run = open_workspace(tmp_path).runs / "toy"
    journal = Journal(run)
    journal.event("resumed", step=3, path=f"{run}/step_3")
    journal.event("damaged", text=f"{run}/step_4 is damaged; {run}/step_3 is used")
    journal.close()
    assert str(tmp_path) not in journal.path.read_text()
    resumed, damaged = read_journal(run)[0]
    assert (resumed["step"], resumed["path"]) == (3, "runs/toy/step_3")
    assert damaged["text"] == "runs/toy/step_4 is damaged; runs/toy/step_3 is used"
    outside = Journal(tmp_path.parent / f"{tmp_path.name}-outside")
    outside.event("resumed", path="/a/b")
    outside.close()
    assert json.loads(outside.path.read_text())["path"] == "/a/b"
