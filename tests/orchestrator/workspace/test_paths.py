"""Paths in a workspace are stored relative to its root, and all others as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.workspace.folders import open_workspace
from orchestrator.workspace.journal import Journal, read_journal
from orchestrator.workspace.paths import absolute_path, portable_path, workspace_root


@pytest.mark.parametrize(
    ("path", "stored"),
    [
        ("{root}/runs/a/step_1", "runs/a/step_1"),
        ("{root}-copy/runs/a", "{root}-copy/runs/a"),
        ("{root}", "{root}"),
        ("/elsewhere/text.txt", "/elsewhere/text.txt"),
        ("", ""),
    ],
)
def test_a_path_comes_back_from_its_stored_form(path: str, stored: str, tmp_path: Path) -> None:
    path, stored = (text.format(root=tmp_path) for text in (path, stored))
    assert portable_path(path, tmp_path) == stored
    assert absolute_path(stored, tmp_path) == path
    assert portable_path(path, None) == absolute_path(path, None) == path


def test_the_nearest_workspace_is_found(tmp_path: Path) -> None:
    assert workspace_root(tmp_path) is None
    outer = open_workspace(tmp_path / "outer").root
    inner = open_workspace(outer / "runs" / "inner").root
    assert workspace_root(outer / "runs" / "a" / "job.json") == outer
    assert workspace_root(inner) == workspace_root(inner / "runs") == inner


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
