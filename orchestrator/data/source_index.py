"""Find prepared data by the settings that they were made from.

A small file maps a source's key, a hash of the settings and of names, sizes and times of files, to
the folder of the data, which is named by the fingerprint of the content.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.data.corpus import source_state
from orchestrator.data.depth import GENERATOR_VERSION
from orchestrator.data.mixture import MIXTURE_VERSION
from orchestrator.data.store import is_complete
from orchestrator.models.hub import is_hub_name
from orchestrator.settings import DataSettings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import expand_user, read_json, write_json
from orchestrator.workspace.layout import is_valid_name
from orchestrator.workspace.provenance import content_key


def source_key(settings: DataSettings, *more: Any) -> str:
    """Return the key of a source; reads no content.

    Args:
        more: What else determines the data, as JSON values.

    Raises:
        UserError: If the source's files do not exist, or the settings name no source.
    """
    if settings.source == "mixture":
        states = {name: source_state(text) for name, text in settings.texts.items()}
        state = ["mixture", MIXTURE_VERSION, GENERATOR_VERSION, states]
    else:
        state = source_state(settings)
    tokenizer_state = None
    is_path = settings.tokenizer != "train" and not is_hub_name(settings.tokenizer)
    if is_path and (path := expand_user(settings.tokenizer)).is_file():
        tokenizer_state = [path.stat().st_size, path.stat().st_mtime_ns]
    return content_key(settings.read_by_source(), state, tokenizer_state, *more)


def index_file(key: str, parent: Path) -> Path:
    """Return the file in `parent` that names the folder of a source's data."""
    return parent / "sources" / f"{key}.json"


def find_folder(key: str, parent: Path) -> Path | None:
    """Return the complete folder in `parent` of a source's data, or None.

    Raises:
        UserError: If the file that names it is damaged.
    """
    path = index_file(key, parent)
    found = read_json(path)
    if found is None:
        return None
    fingerprint = found.get("fingerprint") if isinstance(found, dict) else None
    if not is_valid_name(fingerprint):
        raise UserError(
            f"{path} is damaged (fingerprint: {fingerprint!r}); delete it and run the command again"
        )
    folder = parent / str(fingerprint)
    return folder if is_complete(folder) else None


def store_folder(key: str, folder: Path) -> None:
    """Store the folder of a source's data under its key."""
    write_json(index_file(key, folder.parent), {"fingerprint": folder.name})
