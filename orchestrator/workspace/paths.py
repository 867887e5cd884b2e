"""Paths in stored files: what lies in a workspace is named relative to the workspace's root.

So a workspace can be moved and copied. Paths are absolute in memory. Paths outside the workspace
stay as they are.
"""

from __future__ import annotations

from pathlib import Path

WORKSPACE_FILE_NAME = "workspace.json"
"""The file in the root of every workspace; it holds the version that wrote the workspace."""


def workspace_root(path: Path) -> Path | None:
    """Return the root of the workspace that a path lies in; None if it lies in none."""
    folders = (path, *path.parents)
    return next((f for f in folders if (f / WORKSPACE_FILE_NAME).is_file()), None)


def portable_path(path: str, root: Path | None) -> str:
    """Return the form in which a path is stored: relative if it is absolute and below the root."""
    prefix = f"{root}/"
    return path.removeprefix(prefix) if root and path != prefix else path


def absolute_path(path: str, root: Path | None) -> str:
    """Return the absolute form of a stored path; an empty one stays empty."""
    return str(root / path) if root and path else path
