"""Virtual environments for tests of what is installed: made empty, deleted at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def new_environment() -> Iterator[Path]:
    """Make an environment with pip alone, and yield its Python; delete it at the end.

    pytest keeps the temporary folders of its last runs, and these environments have gigabytes.
    """
    with TemporaryDirectory(prefix="iiet-environment-") as folder:
        venv.create(folder, with_pip=True)
        yield Path(folder) / "bin" / "python"


def install(python: Path, *requirements: str) -> None:
    """Call pip of an environment."""
    run(python, "-m", "pip", "install", "--quiet", *requirements, cwd=python.parent)


def run(program: Path | str, *arguments: str, cwd: Path) -> str:
    """Run a program without this process's Python paths, and return what it prints."""
    process = subprocess.run(
        [str(program), *arguments],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    return process.stdout


def build(target: str, folder: Path) -> Path:
    """Build the `wheel` or the `sdist` of this checkout into a folder, and return its file."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "-d", str(folder)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    [file] = folder.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return file
