"""Only our own scratch folders are deleted, and only after their owner has ended."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from orchestrator.workspace import scratch
from orchestrator.workspace.scratch import (
    OWNER_NAME,
    PREFIX,
    ScratchFolder,
    delete_abandoned_folders,
    make_scratch_folder,
)


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder for this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def end_owner(made: ScratchFolder) -> None:
    """Drop the lock and keep the folder, as after a kill."""
    os.close(made.owner_file)


def test_the_next_process_deletes_an_abandoned_folder(parent: Path) -> None:
    left = make_scratch_folder()
    (left.folder / "session").mkdir()
    (left.folder / "session" / "log").write_text("of a process that was killed")
    end_owner(left)
    other = make_scratch_folder()
    assert list(parent.iterdir()) == [other.folder]
    assert other.folder.stat().st_mode & 0o077 == 0, "other users may not enter it"
    other.delete()
    assert list(parent.iterdir()) == []


def test_a_folder_is_kept_while_its_owner_lives(parent: Path) -> None:
    made = make_scratch_folder()
    delete_abandoned_folders(parent)
    assert (made.folder / OWNER_NAME).is_file()


def test_other_folders_with_similar_names_are_kept(parent: Path) -> None:
    mark = scratch._MARK
    ours = parent / "elsewhere"
    for name in (
        "iiet-2024-ablation",  # No process has this id.
        f"iiet-{2**22 + 1}-results",
        f"{PREFIX}plots",
        f"{PREFIX}owned-by-a-folder/{OWNER_NAME}",
        "elsewhere",
    ):
        (parent / name).mkdir(parents=True)
        (parent / name / "results.csv").write_text("weeks of work")
    # A foreign owner file, a link as owner file, and a link to a folder like ours.
    (parent / f"{PREFIX}plots" / OWNER_NAME).write_text("me")
    (ours / OWNER_NAME).write_text(mark)
    (parent / f"{PREFIX}linked").symlink_to(ours)
    (parent / f"{PREFIX}mine").mkdir()
    (parent / f"{PREFIX}mine" / OWNER_NAME).symlink_to(ours / OWNER_NAME)
    before = sorted(parent.rglob("*"))
    delete_abandoned_folders(parent)
    make_scratch_folder().delete()
    assert sorted(parent.rglob("*")) == before


def test_a_long_temporary_path_is_replaced_by_tmp(parent: Path) -> None:
    made = make_scratch_folder(longest_path=40)
    assert len(str(parent)) > 40
    assert made.folder.parent == Path("/tmp")
    assert len(str(made.folder)) <= 40
    made.delete()
