"""The files for people who use, cite or change the project name what exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert versions[0] == PROJECT["version"]
    assert versions == sorted(versions, reverse=True)


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    own = {name: PROJECT[name] for name in ("version", "license")}
    assert {name: citation[name] for name in own} == own
    assert citation["title"] == PROJECT["name"]
    assert set(citation["keywords"]) <= set(PROJECT["keywords"])
    paper = citation["preferred-citation"]
    assert paper["year"] == 2025
    assert len(paper["authors"]) == 9
    assert paper["url"] in read("README.md")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_links_and_paths_of_a_page_exist(name: str) -> None:
    text = read(name)
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    paths = re.findall(r"`((?:tests|orchestrator|iiet|docs|\.github)/[\w./]*)`", text)
    assert links
    for path in links + paths:
        assert (ROOT / path).exists(), path


def test_make_targets_and_marks_of_the_page_for_contributors_exist() -> None:
    text = read("CONTRIBUTING.md")
    targets = re.findall(r"^([a-z-]+):.*##", read("Makefile"), flags=re.MULTILINE)
    named = re.findall(r"make ([a-z-]+)", text)
    assert {"lint", "test", "test-quick", "test-long", "test-floors", "test-wheel"} <= set(named)
    assert set(named) <= set(targets)
    settings = tomllib.loads(read("pyproject.toml"))["tool"]["pytest"]["ini_options"]
    marks = {mark.partition(":")[0] for mark in settings["markers"]}
    assert marks == set(re.findall(r"marked `(\w+)`", text))
