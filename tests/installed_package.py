"""A package as an installer leaves it: modules in a folder, and metadata with entry points."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

PACKAGE = "my-extensions"


def install(
    folder: Path,
    modules: Mapping[str, str],
    entry_points: Mapping[str, Mapping[str, str]],
    *,
    name: str = PACKAGE,
    version: str = "1.0",
) -> None:
    """Write a package into a folder.

    Args:
        modules: Source by name.
        entry_points: Group -> name -> place of the object.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [
        line
        for group, names in entry_points.items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in names.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)


@contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """Let this process find what is installed in a folder; afterwards it knows nothing of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    for name in [name for name, module in sys.modules.items() if _lies_in(module, folder)]:
        del sys.modules[name]


def _lies_in(module: object, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    # As a text: a path for each of thousands of modules takes long.
    return file is not None and file.startswith(f"{folder}/")
