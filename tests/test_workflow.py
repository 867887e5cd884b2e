"""The workflow for GitHub tests what pyproject.toml promises, by targets of the Makefile."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PREFIX = "Programming Language :: Python :: "
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSIONS = [c.removeprefix(PREFIX) for c in PROJECT["classifiers"] if c.startswith(PREFIX)]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    [file] = (ROOT / ".github" / "workflows").glob("*.yml")
    loaded: dict[Any, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return loaded


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def pythons(job: dict[str, Any]) -> list[str]:
    """Return the versions of Python that a job installs."""
    [version] = [step["with"]["python-version"] for step in job["steps"] if "setup" in str(step)]
    matrix = job.get("strategy", {}).get("matrix", {}).get("python")
    return matrix if version == "${{ matrix.python }}" else [version]


def test_the_classifiers_begin_with_the_required_python() -> None:
    assert PROJECT["requires-python"] == f">={VERSIONS[0]}"
    assert [f"3.{minor}" for minor in range(11, 11 + len(VERSIONS))] == VERSIONS
    assert f"Python {VERSIONS[0]} to {VERSIONS[-1]}" in MAKEFILE.splitlines()[0]


def test_the_quick_tests_run_with_every_python_of_the_classifiers(
    workflow: dict[Any, Any],
) -> None:
    jobs = workflow["jobs"]
    assert pythons(jobs["quick"]) == VERSIONS
    assert all(pythons(jobs[name]) == VERSIONS[:1] for name in set(jobs) - {"quick"})


def test_jobs_call_targets_of_the_makefile_only(workflow: dict[Any, Any]) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", MAKEFILE, flags=re.MULTILINE)
    called = [command for job in workflow["jobs"].values() for command in commands(job)]
    assert set(called) <= {f"make {target}" for target in targets}
    tests = {"test", "test-quick", "test-long", "test-floors", "test-wheel"}
    assert {command.removeprefix("make ") for command in called} == {"lint", "wheel", *tests}


def test_jobs_may_only_read_and_run_for_changes_of_main_and_once_a_week(
    workflow: dict[Any, Any],
) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as true.
    [weekly] = triggers["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \d", weekly["cron"])
    on_demand = {"push": {"branches": ["main"]}, "pull_request": None, "workflow_dispatch": None}
    assert triggers == {**on_demand, "schedule": [weekly]}
    jobs = workflow["jobs"]
    assert all("permissions" not in job for job in jobs.values())
    assert [name for name, job in jobs.items() if "if" in job] == ["long"]
    assert [name for name, job in jobs.items() if job["timeout-minutes"] > 60] == ["long"]
