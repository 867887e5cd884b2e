"""What produced a result: content hashes, versions and the machine.

A key is the hash of all that determines a result and of nothing else, so that equal work has an
equal key on any machine and finished work is found again. Wall-clock time, paths and worker counts
stay out of it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

RECIPE_VERSION = 3
"""Raised by hand when the code changes what a recipe produces, or what a key is made of. It is part
of every key, and a workspace with trainings of another version is refused."""

KEY_LENGTH = 16


def content_key(*parts: Any) -> str:
    """Return a short hash of JSON-able values; the order of mapping keys does not matter."""
    text = json.dumps([RECIPE_VERSION, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_key(path: Path) -> str:
    """Return a short hash of a file's bytes."""
    return file_digest(path)[:KEY_LENGTH]


def environment() -> dict[str, str]:
    """Return versions and machine, to be stored beside a result (not part of its key)."""
    names = ("iiet-orch", "torch", "ray", "mlflow", "lm_eval", "transformers")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: _version(name) for name in names},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
