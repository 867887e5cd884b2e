"""A committed folder is whole or absent, leaves nothing behind, and is verified once."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.workspace import whole_folders
from orchestrator.workspace.whole_folders import checksums_of, damaged_file, new_folder


def _write(folder: Path, **files: str) -> Path:
    with new_folder(folder) as filling:
        for name, text in files.items():
            (filling / name).write_text(text)
    return folder


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_at_the_end_and_replaces_an_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    with new_folder(folder) as filling:
        (filling / "a").write_text("1")
        assert not folder.exists()
    assert _names(folder) == ["a"]
    assert folder.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777
    _write(folder, b="2")
    assert _names(folder) == ["b"]
    assert _names(folder.parent) == ["model"]


def test_an_error_leaves_the_earlier_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = _write(tmp_path / "model", a="1")

    def fail() -> None:
        with new_folder(folder) as filling:
            (filling / "a").write_text("2")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert (folder / "a").read_text() == "1"
    assert _names(tmp_path) == ["model"]


LOCK_LIKE_NFS = """
import errno, fcntl, os
real = fcntl.flock

def flock(descriptor, operation):
    access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    if operation & fcntl.LOCK_EX and access == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    real(descriptor, operation)

fcntl.flock = flock
"""
"""flock as network file systems emulate it by fcntl's locks: not of files opened for reading."""


@pytest.mark.parametrize("file_system", ["", LOCK_LIKE_NFS], ids=["local", "network"])
def test_what_a_killed_process_left_is_deleted_and_a_living_one_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_system: str
) -> None:
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # Set back at the end.
    exec(file_system, {})
    folder = tmp_path / "model"
    code = (
        f"{file_system}\n"
        "import os, sys, pathlib; from orchestrator.workspace.whole_folders import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as filling:\n"
        "    (filling / 'a').write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == -9
    assert len(_names(tmp_path)) == 1
    with new_folder(folder) as mine:
        assert len(_names(tmp_path)) == 1, "only what is being written"
        _write(folder, b="of another writer")
        assert mine.is_dir()
        (mine / "c").write_text("mine")
    assert _names(tmp_path) == ["model"]
    assert _names(folder) == ["c"]


def test_a_file_is_read_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _write(tmp_path / "model", weights="w" * 100, state="s" * 100)
    checksums = checksums_of(folder)
    read: list[str] = []
    digest = whole_folders.file_digest
    monkeypatch.setattr(whole_folders, "file_digest", lambda p: (read.append(p.name), digest(p))[1])
    assert damaged_file(folder, checksums, names=["weights"]) is None
    assert damaged_file(folder, checksums) is None
    assert damaged_file(folder, checksums) is None
    assert read == ["weights", "state"]
    assert damaged_file(folder, checksums, always=True) is None
    assert sorted(read) == ["state", "state", "weights", "weights"]
    (folder / "weights").write_text("x" * 100)
    assert damaged_file(folder, checksums) == "weights was changed after writing"
    assert damaged_file(folder, checksums) == "weights was changed after writing", "never stored"
    (folder / "state").unlink()
    assert damaged_file(folder, checksums, names=["state"]) == "state is missing"
    assert damaged_file(folder, {**checksums, "../model/weights": "0"}, names=["../model/weights"])
