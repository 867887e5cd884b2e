"""Write a settings file to start from, and check that it is valid and its data exist."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.text_files import find_files, read_file
from orchestrator.settings import Settings, read_settings
from orchestrator.settings.files import starting_yaml
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import write_text


def write_starting_file(settings: Settings, path: Path, *, replace: bool = False) -> Path:
    """Write settings with comments; a file that exists is kept unless `replace`.

    Raises:
        UserError: If the file exists, or the settings name text files that do not, or are no text.
    """
    if settings.data.source == "files":
        for text_file in find_files(settings.data):
            if text_file.suffix == ".txt":
                next(read_file(text_file, settings.data.text_field), None)
    write_new_file(path, starting_yaml(settings), replace=replace)
    assert read_settings(path) == settings, "the file says what was asked for"
    return path


def write_new_file(path: Path, text: str, *, replace: bool = False) -> None:
    """Write a text file; one that exists is kept unless `replace`.

    Raises:
        UserError: If the file exists.
    """
    if path.exists() and not (replace and path.is_file()):
        raise UserError(f"{path} exists; give another name, or replace a file with --force")
    write_text(path, text)
