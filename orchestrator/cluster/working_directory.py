"""The files of the working directory that are sent along with a job, as one archive.

These are the files that git tracks or would add; outside a git work tree, all files. Hidden files
and folders (`.git`, `.env`, `.venv`), workspaces, virtual environments and large files stay behind.
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from orchestrator.terminal.formatting import format_bytes, join_names
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.paths import WORKSPACE_FILE_NAME

MAX_FILE_BYTES = 10 * 2**20
"""A larger file stays behind: it is data, not a program or settings."""
MAX_BYTES = 100 * 2**20
"""Ray takes 512 MiB; every node downloads and unpacks it."""
MAX_FILES = 20_000
NUM_FOLDERS_NAMED = 3
_MARKS = (WORKSPACE_FILE_NAME, "pyvenv.cfg")
"""A folder with such a file is a workspace or a virtual environment."""


@dataclass(frozen=True)
class WorkingDirectory:
    """Files to send; all paths are relative to the folder."""

    folder: Path
    files: tuple[Path, ...]
    left_behind: tuple[Path, ...]
    """Files that are too large to be sent."""
    num_bytes: int


def find_files(folder: Path) -> WorkingDirectory:
    """Return the files to send.

    Raises:
        UserError: If they are too many or too large together; names the largest folders.
    """
    sizes: dict[Path, int] = {}
    for path in _listed_files(folder):
        sizes[path] = (folder / path).stat().st_size
        if len(sizes) > MAX_FILES:
            raise UserError(_too_large(folder, sizes, f"more than {MAX_FILES:,} files"))
    sent = {path: size for path, size in sizes.items() if size <= MAX_FILE_BYTES}
    total = sum(sent.values())
    if total > MAX_BYTES:
        raise UserError(_too_large(folder, sent, f"{format_bytes(total)} of files"))
    return WorkingDirectory(folder, tuple(sorted(sent)), tuple(sorted(sizes.keys() - sent)), total)


def write_archive(directory: WorkingDirectory, archive: Path) -> None:
    """Write the files into a zip archive; the same files give the same bytes.

    So Ray recognizes an archive that the cluster has already.
    """
    with ZipFile(archive, "w") as file:
        for path in directory.files:
            entry = ZipInfo(path.as_posix())  # Dated 1980.
            entry.compress_type = ZIP_DEFLATED
            file.writestr(entry, (directory.folder / path).read_bytes())


def _listed_files(folder: Path) -> Iterator[Path]:
    @cache
    def stays_behind(below: Path) -> bool:
        if below == Path():
            return False
        is_hidden = below.name.startswith(".") or below.name == "__pycache__"
        is_marked = any((folder / below / mark).is_file() for mark in _MARKS)
        return is_hidden or is_marked or stays_behind(below.parent)

    listed = _known_to_git(folder)
    for path in _walk(folder, stays_behind) if listed is None else listed:
        is_hidden = path.name.startswith(".")
        if not is_hidden and not stays_behind(path.parent) and (folder / path).is_file():
            yield path


def _known_to_git(folder: Path) -> Iterable[Path] | None:
    """Return the files that git tracks or would add; None outside a git work tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name}


def _walk(folder: Path, stays_behind: Callable[[Path], bool]) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        below = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not stays_behind(below / name)]
        yield from (below / name for name in names)


def _too_large(folder: Path, sizes: dict[Path, int], found: str) -> str:
    by_folder: Counter[str] = Counter()
    for path, size in sizes.items():
        by_folder[f"{path.parts[0]}/" if len(path.parts) > 1 else "files at its top"] += size
    largest = [
        f"{name} ({format_bytes(size)})" for name, size in by_folder.most_common(NUM_FOLDERS_NAMED)
    ]
    return (
        f"the working directory {folder} has {found}, and a job takes at most "
        f"{format_bytes(MAX_BYTES)} along; the largest: {join_names(largest)}. Run the command in "
        "another folder, or in a git work tree let a .gitignore name what the job does not need"
    )
