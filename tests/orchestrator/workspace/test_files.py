"""Files and folders are whole or reported as damaged, and leave nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.workspace.errors import DamagedFile
from orchestrator.workspace.files import (
    VERIFIED_NAME,
    abandoned_folders,
    checksums_of,
    damage_named,
    damaged_file,
    make_scratch_folder,
    new_folder,
    read_json,
    write_json,
)


def test_json_is_whole_or_reported_as_damaged(tmp_path):
    path = tmp_path / "a" / "b.json"
    assert read_json(path) is None
    write_json(path, {"x": 1})
    assert read_json(path) == {"x": 1}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]
    for text in ('{"x":', "null", "[1]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(DamagedFile, match=r"b\.json is damaged"):
            read_json(path)
    stored = {"accuracy": 0.4462, "loss": float("inf"), "by task": {"x": [1, 2.5, None]}}
    write_json(path, stored)
    assert read_json(path) == json.loads(path.read_text()) == stored
    reads: tuple[Callable[[Any], object], ...] = (
        lambda v: v["x"], lambda v: v["a"]["b"], lambda v: int(v["a"]), lambda v: v["a"].items(),
    )  # fmt: skip
    for read in reads:
        with pytest.raises(DamagedFile, match=r"b\.json is damaged"), damage_named(path):
            read({"a": "text"})


def _write(folder: Path, **texts: str) -> Path:
    with new_folder(folder) as filling:
        for name, text in texts.items():
            (filling / name).write_text(text)
    return folder


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_at_the_end_and_after_an_error_the_earlier_one_stays(tmp_path):
    folder = tmp_path / "deep" / "model"
    with new_folder(folder) as filling:
        (filling / "a").write_text("1")
        assert not folder.exists()
    assert _names(folder) == ["a"]
    assert folder.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777
    _write(folder, b="2")
    assert _names(folder) == ["b"]
    assert _names(folder.parent) == ["model"]

    def fail() -> None:
        with new_folder(folder) as filling:
            (filling / "b").write_text("3")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert (folder / "b").read_text() == "2"
    assert _names(folder.parent) == ["model"]


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
    tmp_path, monkeypatch, file_system
):
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # Set back at the end.
    exec(file_system, {})
    folder = tmp_path / "model"
    code = (
        f"{file_system}\n"
        "import os, sys, pathlib; from orchestrator.workspace.files import new_folder\n"
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


def test_a_file_is_read_once_and_again_after_a_change(tmp_path, monkeypatch):
    folder = _write(tmp_path / "model", weights="w" * 100, state="s" * 100)
    checksums = checksums_of(folder)
    read: list[str] = []
    open_path = Path.open

    def noting(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name in checksums:
            read.append(path.name)
        return open_path(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", noting)
    assert damaged_file(folder, checksums) is None
    assert not read, "the writer has read them"
    (folder / VERIFIED_NAME).unlink()
    assert damaged_file(folder, checksums, names=["weights"]) is None
    assert _names(folder) == ["state", "weights"], "only a run stores what it has verified"
    assert damaged_file(folder, checksums, names=["weights"], remember=True) is None
    assert damaged_file(folder, checksums, remember=True) is None
    assert damaged_file(folder, checksums) is None
    assert read == ["weights", "state"], "each once in a process"
    another = (
        "import json, sys; from pathlib import Path; from orchestrator.workspace import files\n"
        "checksums = json.loads(sys.argv[2])\n"
        "def refuse(event, arguments):\n"
        "    assert event != 'open' or Path(str(arguments[0])).name not in checksums\n"
        "sys.addaudithook(refuse)\n"
        "assert files.damaged_file(Path(sys.argv[1]), checksums) is None"
    )
    arguments = [str(folder), json.dumps(checksums)]
    done = subprocess.run([sys.executable, "-c", another, *arguments], check=False)
    assert done.returncode == 0, "another process need not read them"
    read.clear()
    assert damaged_file(folder, checksums, always=True) is None
    assert sorted(read) == ["state", "weights"]
    (folder / "weights").write_text("x" * 100)
    damage = "weights was changed after writing"
    for _ in range(2):
        assert damaged_file(folder, checksums, remember=True) == damage, "never stored"
    (folder / "state").unlink()
    assert damaged_file(folder, checksums, names=["state"]) == "state is missing"


@pytest.mark.parametrize("name", ["../other/weights", "{parent}/other/weights"])
def test_a_file_of_another_folder_is_refused_whatever_its_content(tmp_path, name):
    folder = _write(tmp_path / "model", weights="w")
    other_checksums = checksums_of(_write(tmp_path / "other", weights="v"))
    name = name.format(parent=tmp_path)
    assert (folder / name).read_text() == "v"
    damage = damaged_file(folder, {name: other_checksums["weights"]})
    assert str(damage).startswith(name)


@pytest.fixture
def parent(tmp_path, monkeypatch) -> Path:
    """The place of temporary files, for this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_scratch_folder_is_kept_while_its_owner_lives_and_then_deleted(parent):
    abandoned = make_scratch_folder()
    living = make_scratch_folder()
    (abandoned.folder / "session").mkdir()
    (abandoned.folder / "session" / "log").write_text("of a process that was killed")
    assert parent not in {folder.parent for folder in abandoned_folders()}
    os.close(abandoned.lock)  # As after a kill.
    assert abandoned.folder in abandoned_folders()
    second = make_scratch_folder()
    assert {*parent.iterdir()} == {living.folder, second.folder}
    assert second.folder.stat().st_mode & 0o077 == 0, "other users may not enter it"
    second.delete()
    living.delete()
    assert not _names(parent)
    short = make_scratch_folder(longest_path=40)
    assert len(str(parent)) > 40
    assert short.folder.parent == Path("/tmp")
    assert len(str(short.folder)) <= 40
    short.delete()


def test_links_and_other_folders_are_never_deleted(parent):
    abandoned = make_scratch_folder()
    elsewhere = parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "results.csv").write_text("weeks of work")
    (elsewhere / "lock").touch()
    linked = parent / abandoned.folder.name.replace("ray", "linked")
    linked.symlink_to(elsewhere)
    owner = parent / abandoned.folder.name.replace("ray", "owner-is-a-link")
    owner.mkdir()
    (owner / "lock").symlink_to(elsewhere / "lock")
    before = sorted(parent.rglob("*"))
    make_scratch_folder().delete()
    assert sorted(parent.rglob("*")) == before
    abandoned.delete()
