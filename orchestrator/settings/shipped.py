"""The sweeps that come with the program: YAML files, found by name wherever the program is
installed.

In a checkout they stand at the top, where people look; a wheel carries them inside the package.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from orchestrator.workspace.errors import UserError, quoted

_PACKAGE = Path(__file__).resolve().parent.parent


def sweeps_folder() -> Path:
    """Return the folder of the shipped YAML files."""
    installed = _PACKAGE / "sweeps"
    return installed if installed.is_dir() else _PACKAGE.parent / "sweeps"


def shipped_sweeps() -> dict[str, Path]:
    """Return name -> file of every shipped sweep, by name."""
    return {path.stem: path for path in sorted(sweeps_folder().glob("*.yaml"))}


def find_settings_file(name: str) -> Path:
    """Return the file that a user means: a path, or the name of a shipped sweep.

    Raises:
        UserError: If it is neither.
    """
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):
        pass  # A text that can be no path on this machine, such as one that is too long.
    shipped = shipped_sweeps()
    if name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(shipped)}"
    raise UserError(
        f"there is no settings file {quoted(name)} and no shipped sweep of that name; {hint}"
    )
