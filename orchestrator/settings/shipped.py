"""The sweeps that come with the program: YAML files, found by name.

A checkout has them at its top; a wheel carries them inside the package.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from orchestrator.workspace.errors import UserError, quoted

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_sweeps() -> dict[str, Path]:
    """Return name -> file of every shipped sweep, sorted by name."""
    installed = _PACKAGE / "sweeps"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "sweeps"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_settings_file(name: str) -> Path:
    """Return the file of a path, or of the name of a shipped sweep; a `UserError` for others."""
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):
        pass  # A text that cannot be a path on this machine, such as one that is too long.
    shipped = shipped_sweeps()
    if name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(shipped)}"
    raise UserError(
        f"there is no settings file {quoted(name)} and no shipped sweep of that name; {hint}"
    )
