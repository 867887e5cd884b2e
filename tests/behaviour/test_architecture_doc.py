"""docs/architecture.md is correct: its packages, files, functions and methods exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import packages_figure
import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\| `([\w/]+\.py)` \| (.+?) \|", TEXT, flags=re.MULTILINE)


def source(path: str) -> Path:
    is_whole = path.startswith(("iiet/", "tests/", "examples/", "research/", "docs/"))
    return ROOT / path if is_whole else ROOT / "orchestrator" / path


def definitions(path: Path) -> set[str]:
    """Return the functions and classes of a module, and `Class.method` of each class."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return names


def test_every_named_file_exists() -> None:
    for path in re.findall(r"`([\w/]+\.py)`", TEXT):
        assert source(path).is_file(), path


@pytest.mark.parametrize(("path", "functions"), STEPS)
def test_every_named_function_exists(path: str, functions: str) -> None:
    named = re.findall(r"`([\w.]+)`", functions)
    assert named
    assert set(named) <= definitions(source(path)), path


def test_each_value_is_traced_in_many_steps() -> None:
    assert len(STEPS) >= 40
    assert TEXT.count("\n## A") == 3


def test_every_named_folder_exists() -> None:
    folders = re.findall(r"^- `([a-z/_]+)/`: ", TEXT, flags=re.MULTILINE)
    assert len(folders) >= 7
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder


def test_the_packages_are_those_of_the_orchestrator() -> None:
    named = re.findall(r"^\| `(\w+)/` \|", TEXT, flags=re.MULTILINE)
    assert set(named) == {p.parent.name for p in (ROOT / "orchestrator").glob("*/__init__.py")}
    drawn = {*packages_figure.PLACES, *packages_figure.USED_BY_ALL}
    assert drawn == {*named, "iiet"}


def test_each_drawn_package_gives_or_gets_something_and_the_figure_is_shown(tmp_path: Path) -> None:
    ends = {end for giver, receiver, _ in packages_figure.FLOWS for end in (giver, receiver)}
    assert ends == set(packages_figure.PLACES)
    (drawn,) = packages_figure.write_figure(tmp_path / "packages")
    shown = ROOT / "docs" / re.findall(r"!\[.*?\]\((images/packages.png)\)", TEXT)[0]
    width_and_height = slice(16, 24)  # Of a PNG file.
    assert drawn.read_bytes()[width_and_height] == shown.read_bytes()[width_and_height]
