"""`iiet` works where PyTorch is the only library, and names the library that a part needs more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import iiet

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "core_program.py"


def distributions_of(name: str, seen: set[str]) -> Iterator[metadata.Distribution]:
    """Yield an installed distribution and all that it needs."""
    seen.add(name)
    own = metadata.distribution(name)
    yield own
    for requirement in map(Requirement, own.requires or ()):
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_needed and requirement.name not in seen:
            yield from distributions_of(requirement.name, seen)


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to PyTorch, what PyTorch needs, and the metadata of this project."""
    folder = tmp_path_factory.mktemp("torch-alone")
    found = [*distributions_of("torch", set()), metadata.distribution("iiet-orch")]
    for distribution in found:
        tops = {file.parts[0] for file in distribution.files or ()}
        for top in tops - {"..", "__pycache__"}:
            place = Path(str(distribution.locate_file(top)))
            link = folder / top
            if not link.exists() and place.suffix != ".pth":
                link.symlink_to(place)
    return folder


@pytest.fixture(scope="module")
def found(torch_alone: Path) -> dict[str, Any]:
    # Without `site`, Python searches its own library and these folders only.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(torch_alone), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-S", str(PROGRAM)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
def test_the_core_trains_measures_distills_and_generates(found: dict[str, Any]) -> None:
    assert found["file"] == iiet.__file__
    assert found["missing"] == []
    assert found["losses"] == sorted(found["losses"], reverse=True)
    assert found["influences"] == [2, 1]
    assert found["distillation"] > 0
    assert found["generated"] == [1, 7]


@pytest.mark.slow
def test_the_version_is_the_installed_one(found: dict[str, Any]) -> None:
    assert found["version"] == iiet.__version__ == metadata.version("iiet-orch")


@pytest.mark.slow
def test_files_need_a_library_that_is_named_with_the_command(found: dict[str, Any]) -> None:
    for part in ("save", "load"):
        assert "safetensors, which is not installed; type pip install safetensors" in found[part]
