"""Content keys, and the environment that produced a result.

A key is the hash of everything that determines a result, but not of time, paths or worker counts.
So equal work has an equal key on any machine, and finished work is found again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.workspace.processors import num_cpus, processor_name

RECIPE_VERSION = 4
"""Part of every key; raise it when the code changes a recipe's result or the content of a key."""
KEY_LENGTH = 16
NOT_INSTALLED = "not installed"
"""The version of a package that is missing."""


def content_key(*parts: Any) -> str:
    """Return a short hash of JSON values; the order of mapping keys does not matter."""
    text = json.dumps([RECIPE_VERSION, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_key(path: Path) -> str:
    """Return a short hash of a file."""
    return file_digest(path)[:KEY_LENGTH]


def environment() -> dict[str, str]:
    """Return versions and machine, stored with a result but not part of its key."""
    packages = ("iiet-orch", "torch", "ray", "mlflow", "lm_eval", "transformers")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: installed_version(name) for name in packages},
    }


def timing_environment() -> dict[str, str | int]:
    """Return the environment, the processor and the number of CPUs: times hold for these alone."""
    return {**environment(), "processor": processor_name(), "cpus": num_cpus()}


def extension_packages() -> dict[str, str]:
    """Return the packages that extend this program by entry points, and their versions.

    `docs/extending.md` lists the groups of entry points.
    """
    return dict(_extension_packages(tuple(sys.path)))


@lru_cache(maxsize=16)
def _extension_packages(search_path: tuple[str, ...]) -> dict[str, str]:  # noqa: ARG001
    # Reading all metadata takes milliseconds, and each checkpoint asks. The search path is only the
    # key of the cache: it decides what is found.
    entry_points = metadata.entry_points()
    groups = [group for group in entry_points.groups if group.startswith(("iiet.", "iiet_orch."))]
    extensions = [entry for group in groups for entry in entry_points.select(group=group)]
    return {entry.dist.name: entry.dist.version for entry in extensions if entry.dist}


@cache
def installed_version(name: str) -> str:
    """Return the version of a distribution, or `NOT_INSTALLED`; it is read once."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
