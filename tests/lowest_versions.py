"""Prints the lowest versions that pyproject.toml allows, as constraints for pip.

`make test-floors` installs them. Libraries that the project's libraries need, but the project
itself does not, are left to pip, which takes the newest that fits. Runs before anything is
installed, so the standard library has to do.
"""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
EXTRAS = ("cluster", "docs", "gguf", "gpu")
"""Tools for tests are installed in their newest versions."""


def lowest_versions() -> dict[str, str]:
    """Return name -> lowest version of every library with a lower bound."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = [r for extra in EXTRAS for r in project["optional-dependencies"][extra]]
    bounds = (re.match(r"([\w.-]+)[^<>=]*>=([\w.]+)", r) for r in project["dependencies"] + extras)
    return {bound[1]: bound[2] for bound in bounds if bound}


if __name__ == "__main__":
    for name, version in lowest_versions().items():
        print(f"{name}=={version}")
