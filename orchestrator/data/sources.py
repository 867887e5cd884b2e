"""Open a folder of prepared data, whatever it was made from."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

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


@lru_cache(maxsize=64)
def describe_data(folder: Path | str) -> tuple[str, str, dict[str, Any]]:
    """Return name, fingerprint and profile of a folder of prepared data, for a tracked run.

    Raises:
        UserError: As `open_data`.
    """
    data = open_data(folder)
    profile = data.profile
    # Depth tasks, sources of a mixture, a data set of the hub, else the only source.
    mixed = ", ".join(data.source_names)
    name = profile.get("tasks") or mixed or profile.get("hub_name") or profile["source"]
    return name, data.fingerprint, profile
