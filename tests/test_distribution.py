"""The wheel and the source archive hold what they should, and nothing else."""

from __future__ import annotations

import configparser
import email
import re
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from new_environment import ROOT, build

from orchestrator.workspace.files import VERIFIED_NAME

pytestmark = pytest.mark.slow  # Each builds an archive, if it is the first.

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STEM = f"iiet_orch-{PROJECT['version']}"
PACKAGES = ("iiet", "orchestrator")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(f"{STEM}.dist-info/METADATA"))


def sources(*folders: str) -> set[str]:
    """Return the files in folders of this checkout, as paths relative to it."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    made = {"__pycache__", VERIFIED_NAME}  # By the interpreter, and by tests that read a run.
    return {str(path.relative_to(ROOT)) for path in found if made.isdisjoint(path.parts)}


def test_the_wheel_holds_the_packages_and_the_sweeps(wheel: zipfile.ZipFile) -> None:
    assert Path(str(wheel.filename)).name == f"{STEM}-py3-none-any.whl"
    names = set(wheel.namelist())
    own = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    sweeps = {f"orchestrator/{path}" for path in sources("sweeps")}
    assert sweeps
    assert names == {
        *sources(*PACKAGES),
        *sweeps,
        *(f"{STEM}.dist-info/{name}" for name in own),
    }
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    licence = wheel.read(f"{STEM}.dist-info/licenses/LICENSE").decode()
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_wheel_has_the_commands(wheel: zipfile.ZipFile) -> None:
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(f"{STEM}.dist-info/entry_points.txt").decode())
    assert dict(entries["console_scripts"]) == PROJECT["scripts"]
    for group, values in PROJECT.get("entry-points", {}).items():
        assert dict(entries[group]) == values


def test_the_metadata_are_those_of_pyproject(metadata: Message) -> None:
    assert metadata["Name"] == PROJECT["name"]
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Summary"] == PROJECT["description"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["License-Expression"] == PROJECT["license"]
    assert metadata.get_all("Classifier") == PROJECT["classifiers"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "# iiet-orch" in metadata.get_payload()
    extras = PROJECT["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(extras)
    assert {"cluster", "gpu", "test", "dev"} <= set(extras)
    required = metadata.get_all("Requires-Dist", [])
    assert len([r for r in required if "extra ==" not in r]) == len(PROJECT["dependencies"])


def test_the_extras_for_users_are_installed_for_developers() -> None:
    extras = PROJECT["optional-dependencies"]
    own = [r for name in ("dev", "test") for r in extras[name] if r.startswith("iiet-orch[")]
    listed = {extra for r in own for extra in re.findall(r"[\w-]+", r.partition("[")[2])}
    assert {"test", "cluster", "gguf", "gpu", "tensorboard"} <= listed <= set(extras)


def test_a_wheel_can_be_built_and_tested_from_the_source_archive(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {member.name.removeprefix(f"{STEM}/") for member in archive if member.isfile()}
    folders = (*PACKAGES, "sweeps", "benchmarks", "examples", "research", "tests", "docs")
    assert names >= sources(*folders)
    tops = {name.partition("/")[0] for name in names}
    assert tops == {
        *folders,
        *(".github", ".gitignore", ".pre-commit-config.yaml", "Makefile", "PKG-INFO"),
        *("pyproject.toml", "README.md", "LICENSE"),
        *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"),
    }
