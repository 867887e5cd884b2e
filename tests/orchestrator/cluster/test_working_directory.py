"""What is sent along with a job: the files of the working directory that a command may need."""

from __future__ import annotations

import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest

from orchestrator.cluster import working_directory
from orchestrator.cluster.working_directory import find_files, write_archive
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.folders import open_workspace

SENT = ("own/__init__.py", "own/data/model.py", "runs.yaml")
HIDDEN = (".env", ".cache/a.txt", "own/.notes")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(working_directory, "MAX_FILE_BYTES", 1000)
    for name in (*SENT, *HIDDEN, "env/bin/tool.py", "env/pyvenv.cfg", "own/__pycache__/a.pyc"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "corpus.txt").write_text("x" * 1001)
    (open_workspace(tmp_path / "results").logs).mkdir()
    (tmp_path / "results" / "logs" / "a.log").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    return tmp_path


def make_repository(folder: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


def names(paths: tuple[Path, ...]) -> list[str]:
    return [str(path) for path in paths]


@pytest.mark.parametrize("is_repository", [False, True])
def test_settings_and_code_are_sent_and_all_else_stays(folder: Path, is_repository: bool) -> None:
    if is_repository:
        make_repository(folder)
    found = find_files(folder)
    assert names(found.files) == sorted(SENT)
    assert names(found.left_behind) == ["corpus.txt"]
    assert found.num_bytes == sum(map(len, SENT))


def test_what_git_ignores_stays_and_what_it_tracks_is_sent(folder: Path) -> None:
    make_repository(folder)
    (folder / ".gitignore").write_text("*.yaml\n")
    subprocess.run(["git", "add", "own"], cwd=folder, check=True)
    (folder / "own" / "__init__.py").unlink()
    assert names(find_files(folder).files) == ["own/data/model.py"]


def test_the_same_files_give_the_same_archive(folder: Path, tmp_path: Path) -> None:
    archives = []
    for name in ("first.zip", "second.zip"):
        for path in SENT:
            (folder / path).write_text(path)  # At another time.
        archive = tmp_path.parent / name
        write_archive(find_files(folder), archive)
        archives.append(archive)
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with ZipFile(archives[0]) as file:
        assert file.namelist() == sorted(SENT)
        assert file.read("runs.yaml") == b"runs.yaml"


@pytest.mark.parametrize(
    ("limit", "words"),
    [("MAX_BYTES", r"has 41 B of files"), ("MAX_FILES", r"has more than 2 files")],
)
def test_too_much_is_refused_with_the_largest_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str, words: str
) -> None:
    monkeypatch.setattr(working_directory, limit, 2)
    with pytest.raises(UserError, match=rf"{words}.*the largest: .*own/ \("):
        find_files(folder)
