"""docs/extending.md is correct: its package is installed as it stands, its commands run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from commands import settings_options
from installed_package import install, on_path
from small_size import SMALL

from orchestrator import cli
from orchestrator.models.folder import METHOD_PACKAGE, load_provenance
from orchestrator.pipelines.doctor import examine, extension_points
from orchestrator.workspace.layout import Workspace

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TRAINS = {"pretrain"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


PACKAGE = ROOT / "examples" / "extensions"
PYPROJECT = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))
MODULES = {
    name: (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    for name in PYPROJECT["tool"]["setuptools"]["py-modules"]
}
LINES = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]


def line_with(words: str) -> list[str]:
    """Return the command of the page that contains these words, at a small size."""
    [line] = [line for line in LINES if words in line]
    command = shlex.split(line)[1:]
    small = settings_options(SMALL, command[0]) if command[0] != "export" else []
    return [command[0], *small, *command[1:]]


class Place:
    """A folder in which the page's commands run, with the package installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = folder / "site"
        self.workspace = folder / "iiet-workspace"
        groups = PYPROJECT["project"]["entry-points"]
        install(self.site, MODULES, groups, name=PYPROJECT["project"]["name"])
        self.done: set[str] = set()

    def run(self, words: str, code: int = 0) -> None:
        """Run the line of the page with these words in this process, once."""
        if words in self.done:
            return
        command = line_with(words)
        with on_path(self.site), pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.delenv("IIET_WORKSPACE")  # The page uses the folder's own.
            assert cli.main([*command, *(["--local"] if command[0] in TRAINS else [])]) == code
        self.done.add(words)

    def checkpoint(self, run: str) -> Path:
        """Return the newest checkpoint of a run."""
        return max((self.workspace / "runs" / run).glob("step_*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("extending"))


def test_the_package_of_the_page_extends_everything_that_can_be(place):
    groups = {point.group for point in extension_points()}
    assert set(PYPROJECT["project"]["entry-points"]) == groups
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(MODULES)
    with on_path(place.site):
        findings = [f for f in examine(Workspace(place.workspace)) if f.name == "extensions"]
    assert [finding.state for finding in findings] == ["ok"] * 3


@pytest.mark.long
def test_the_method_trains_in_ray(place):
    # The command has a process of its own, whose Ray starts its workers with this path.
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *line_with("--method heavy_ball")],
        env={
            **os.environ,
            "IIET_WORKSPACE": str(place.workspace),
            "PYTHONPATH": f"{place.site}{os.pathsep}{ROOT}",
        },
        cwd=place.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_provenance(place.checkpoint("heavy"))[METHOD_PACKAGE] == "my-extensions 1.0"


@pytest.mark.slow
def test_the_method_trains_and_is_missed_where_its_package_is_not(place, capsys):
    place.run("--method heavy_ball")
    checkpoint = place.checkpoint("heavy")
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["method"], config["method_options"]) == ("heavy_ball", {"momentum": 0.2})
    provenance = load_provenance(checkpoint)
    assert provenance[METHOD_PACKAGE] == "my-extensions 1.0"
    assert provenance["environment"]["my-extensions"] == "1.0"
    capsys.readouterr()
    for command in (["generate", "--prompt", "x"], ["evaluate"], ["influence"], ["benchmark"]):
        assert cli.main([*command, "heavy", "--workspace", str(place.workspace)]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "is a model of the method 'heavy_ball', which the package my-extensions 1.0" in error
    assert cli.main(["list", "--workspace", str(place.workspace)]) == 0
    assert "heavy" in capsys.readouterr().out


@pytest.mark.slow
def test_the_metric_measures(place, capsys):
    place.run("pretrain --name iterated")
    place.run("--metric angle")
    place.run("--metric cosine")
    checkpoint = place.checkpoint("iterated")
    angle, cosine = (
        [value for row in json.loads(file.read_text())["table"]["values"] for value in row]
        for file in (checkpoint / f"influence-{metric}.json" for metric in ("angle", "cosine"))
    )
    assert len(angle) == 6
    # The mean of an angle is at most that of the mean cosine: both are measured on the same tokens.
    assert all(0 < a**2 / 2 <= 1.1 * c for a, c in zip(angle, cosine, strict=True))
