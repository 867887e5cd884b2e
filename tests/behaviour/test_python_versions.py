"""The quick tests pass with every Python that pyproject.toml names, and with the lowest libraries.

Each calls the Makefile's target as the workflow for GitHub does, in an environment of its own.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from new_environment import ROOT, interpreter, run

pytestmark = [pytest.mark.installs, pytest.mark.timeout(3 * 3600)]

PREFIX = "Programming Language :: Python :: "
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSIONS = [c.removeprefix(PREFIX) for c in PROJECT["classifiers"] if c.startswith(PREFIX)]
LOWEST = VERSIONS[0]


def make(target: str, version: str, *variables: str) -> str:
    """Call a target of the Makefile with a version of Python, and return what it prints."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"needs Python {version}")
    return run("make", target, f"PYTHON={python}", *variables, cwd=ROOT)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_quick_tests_pass_with_python(version: str) -> None:
    with TemporaryDirectory(prefix="iiet-environment-") as folder:
        printed = make("test-quick", version, f"VENV={folder}")
        own = Path(folder) / "lib" / f"python{version}" / "site-packages" / "torch"
        assert own.is_dir()
    assert " passed" in printed


def test_the_quick_tests_pass_with_the_lowest_libraries() -> None:
    with TemporaryDirectory(prefix="iiet-environment-") as folder:
        printed = make("test-floors", LOWEST, f"FLOORS={folder}")
        site = Path(folder) / "lib" / f"python{LOWEST}" / "site-packages"
        torch = next(r for r in PROJECT["dependencies"] if r.startswith("torch>="))
        floor = torch.removeprefix("torch>=")
        assert [*site.glob(f"torch-{floor}*.dist-info")], list(site.glob("torch-*"))
    assert " passed" in printed
