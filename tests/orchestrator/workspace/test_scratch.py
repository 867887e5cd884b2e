"""Only our own folders are deleted, and only when nobody uses them any more."""

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
    """The folder for temporary files, of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def end_owner(made: ScratchFolder) -> None:
    """Do as the system does when the owner is killed: the folder stays, the lock goes."""
    os.close(made.owner_file)


def test_a_folder_is_deleted_by_the_next_start_after_its_owner_has_ended(parent: Path) -> None:
    left = make_scratch_folder()
    (left.folder / "session").mkdir()
    (left.folder / "session" / "log").write_text("of a process that was killed")
    end_owner(left)
    other = make_scratch_folder()
    assert list(parent.iterdir()) == [other.folder]
    assert other.folder.stat().st_mode & 0o077 == 0, "nobody else may enter it"
    other.delete()
    assert list(parent.iterdir()) == []


def test_a_folder_whose_owner_lives_stays(parent: Path) -> None:
    made = make_scratch_folder()
    delete_abandoned_folders(parent)
    assert (made.folder / OWNER_NAME).is_file()


def test_folders_of_users_that_are_named_alike_stay(parent: Path) -> None:
    mark = scratch._MARK
    ours = parent / "elsewhere"
    for name in (
        "iiet-2024-ablation",  # no process has this number
        f"iiet-{2**22 + 1}-results",
        f"{PREFIX}plots",
        f"{PREFIX}owned-by-a-folder/{OWNER_NAME}",
        "elsewhere",
    ):
        (parent / name).mkdir(parents=True)
        (parent / name / "results.csv").write_text("weeks of work")
    # One with a file of that name, one whose owner file is a link, and a link to what looks ours.
    (parent / f"{PREFIX}plots" / OWNER_NAME).write_text("me")
    (ours / OWNER_NAME).write_text(mark)
    (parent / f"{PREFIX}linked").symlink_to(ours)
    (parent / f"{PREFIX}mine").mkdir()
    (parent / f"{PREFIX}mine" / OWNER_NAME).symlink_to(ours / OWNER_NAME)
    before = sorted(parent.rglob("*"))
    delete_abandoned_folders(parent)
    make_scratch_folder().delete()
    assert sorted(parent.rglob("*")) == before


def test_a_socket_in_it_has_a_path_of_at_most_107_characters(parent: Path) -> None:
    made = make_scratch_folder(longest_path=40)
    assert len(str(parent)) > 40
    assert made.folder.parent == Path("/tmp")
    assert len(str(made.folder)) <= 40
    made.delete()
