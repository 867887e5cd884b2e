"""The wheel runs where nothing else is installed: `iiet` with PyTorch alone, and a whole sweep."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from commands import settings_options
from new_environment import ROOT, build, install, new_environment, run
from small_size import SMALL

pytestmark = [pytest.mark.installs, pytest.mark.timeout(3600)]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TORCH = next(r for r in PROJECT["dependencies"] if r.startswith("torch"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("dist"))


def test_the_core_runs_with_pytorch_alone(wheel, tmp_path):
    program = shutil.copy(ROOT / "tests" / "core_program.py", tmp_path)
    with new_environment() as python:
        install(python, TORCH)
        install(python, "--no-deps", str(wheel))
        listed = json.loads(run(python, "-m", "pip", "list", "--format=json", cwd=tmp_path))
        report = json.loads(run(python, str(program), cwd=tmp_path))
        environment = str(python.parents[1])
    names = {entry["name"].lower() for entry in listed}
    assert {"torch", "iiet-orch"} <= names
    assert names.isdisjoint({"numpy", "transformers", "safetensors", "ray", "mlflow"})
    assert report["file"].startswith(environment)
    assert report["version"] == PROJECT["version"]
    assert report["missing"] == []
    assert report["losses"] == sorted(report["losses"], reverse=True)
    assert "pip install safetensors" in report["save"]
    assert "pip install safetensors" in report["load"]


def test_the_wheel_installs_its_libraries_and_runs_a_sweep(wheel, tmp_path):
    settings = settings_options(SMALL, "sweep")
    workspace = ["--workspace", str(tmp_path / "workspace")]
    with new_environment() as python:
        install(python, str(wheel))
        command = python.parent / "iiet-orch"
        run(python, "-m", "pip", "check", cwd=tmp_path)
        assert run(command, "--version", cwd=tmp_path).split()[-1] == PROJECT["version"]
        doctor = json.loads(run(command, "doctor", "--json", *workspace, cwd=tmp_path))
        listed = run(command, "config", "list", cwd=tmp_path)
        printed = run(command, "sweep", "toy", *settings, *workspace, cwd=tmp_path)
        exported = run(
            command, "pick", "--best", "--to", str(tmp_path / "model"), *workspace, cwd=tmp_path
        )
    version_texts = [f["text"] for f in doctor["findings"] if f["check"] == "versions"]
    assert str(python.parents[1]) in version_texts[0]
    for file in (ROOT / "sweeps").glob("*.yaml"):
        assert file.stem in listed
    for word in ("vanilla", "r = 0", "teacher", "front.html"):
        assert word in printed
    assert "model" in exported
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "model" / "modeling_iiet.py").is_file()
