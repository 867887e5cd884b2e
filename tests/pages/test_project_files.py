"""The files around the code say what is true: changelog, citation, Makefile, workflow, archives."""

from __future__ import annotations

import configparser
import email
import re
import tarfile
import tomllib
import zipfile

import pytest
import yaml
from new_environment import ROOT, build

from orchestrator.workspace.files import VERIFIED_NAME


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PYPROJECT = tomllib.loads(read("pyproject.toml"))
PROJECT = PYPROJECT["project"]
TARGETS = set(re.findall(r"^([a-z-]+):.*##", read("Makefile"), flags=re.MULTILINE))
TESTS = {"test", "test-quick", "test-long", "test-floors", "test-wheel"}
STEM = f"iiet_orch-{PROJECT['version']}"
PACKAGES = ("iiet", "orchestrator")


def test_changelog_and_citation_are_of_this_version():
    sections = re.findall(r"^## (\S+)", read("CHANGELOG.md"), flags=re.MULTILINE)
    versions = sections[1:] if sections[0] == "Unreleased" else sections
    assert versions[0] == PROJECT["version"]
    assert versions == sorted(versions, reverse=True)
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["preferred-citation"]["url"] in read("README.md")


def test_paths_targets_and_marks_of_the_page_for_contributors_exist():
    for name in ("CONTRIBUTING.md", "SECURITY.md"):
        links = re.findall(r"\]\((?!http)([^)#]+)", read(name))
        paths = re.findall(r"`((?:tests|orchestrator|iiet|docs|\.github)/[\w./]*)`", read(name))
        assert links
        assert not [path for path in links + paths if not (ROOT / path).exists()]
    text = read("CONTRIBUTING.md")
    named = set(re.findall(r"make ([a-z-]+)", text))
    assert {"lint", *TESTS} <= named <= TARGETS
    marks = {m.partition(":")[0] for m in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert marks == set(re.findall(r"marked `(\w+)`", text))


def sources(*folders: str) -> set[str]:
    """Return the files in folders of this checkout, as paths relative to it."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    generated = {"__pycache__", VERIFIED_NAME}  # By the interpreter, and by tests that read a run.
    return {str(path.relative_to(ROOT)) for path in paths if generated.isdisjoint(path.parts)}


@pytest.mark.slow
def test_the_wheel_holds_packages_sweeps_commands_and_metadata(tmp_path):
    wheel = zipfile.ZipFile(build("wheel", tmp_path))
    metadata_files = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    sweeps = {f"orchestrator/{path}" for path in sources("sweeps")}
    info = f"{STEM}.dist-info"
    assert set(wheel.namelist()) == {
        *sources(*PACKAGES), *sweeps, *(f"{info}/{name}" for name in metadata_files),
    }  # fmt: skip
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(entries["console_scripts"]) == PROJECT["scripts"]
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["Version"] == PROJECT["version"]
    assert "# iiet-orch" in metadata.get_payload()
    extras = PROJECT["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(extras)
    inherited = [r for name in ("dev", "test") for r in extras[name] if r.startswith("iiet-orch[")]
    listed = {extra for r in inherited for extra in re.findall(r"[\w-]+", r.partition("[")[2])}
    assert {"test", "cluster", "gguf", "gpu"} <= listed <= set(extras)


@pytest.mark.slow
def test_a_wheel_can_be_built_and_tested_from_the_source_archive(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {member.name.removeprefix(f"{STEM}/") for member in archive if member.isfile()}
    folders = (
        *PACKAGES, "sweeps", "benchmarks", "examples", "modeling", "research", "tests", "docs",
    )  # fmt: skip
    assert names >= sources(*folders)
    assert {name.partition("/")[0] for name in names} == {
        *folders,
        *(".github", ".gitignore", ".pre-commit-config.yaml", "Makefile", "PKG-INFO"),
        *("pyproject.toml", "README.md", "LICENSE"),
        *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"),
    }
