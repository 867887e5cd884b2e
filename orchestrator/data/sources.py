"""Open a folder of prepared data, whatever it was made from."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.depth.store import open_depth
from orchestrator.data.mixture import open_mixture
from orchestrator.data.prepared import PreparedData, check_files, read_manifest
from orchestrator.data.token_store import map_tokens


def open_data(folder: Path | str) -> PreparedData:
    """Open a folder of prepared data; check the sizes of its files, but not their content.

    Raises:
        UserError: If the folder is missing, incomplete or damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if manifest.settings.get("source") == "depth":
        return open_depth(folder, manifest)
    if manifest.settings.get("source") == "mixture":
        return open_mixture(folder, manifest)
    return map_tokens(folder, manifest)
