"""`iiet` works where PyTorch is the only library, and names the library that a part needs more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import iiet

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "core_program.py"


def distributions_of(name: str, visited: set[str]) -> Iterator[metadata.Distribution]:
    """Yield an installed distribution and all that it needs."""
    visited.add(name)
    distribution = metadata.distribution(name)
    yield distribution
    for requirement in map(Requirement, distribution.requires or ()):
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_needed and requirement.name not in visited:
            yield from distributions_of(requirement.name, visited)


@pytest.mark.slow
def test_the_core_works_with_pytorch_alone_and_names_the_library_that_loading_needs(tmp_path):
    # Links to PyTorch, what PyTorch needs, and the metadata of this project.
    for distribution in [*distributions_of("torch", set()), metadata.distribution("iiet-orch")]:
        tops = {file.parts[0] for file in distribution.files or ()}
        for top in tops - {"..", "__pycache__"}:
            place = Path(str(distribution.locate_file(top)))
            link = tmp_path / top
            if not link.exists() and place.suffix != ".pth":
                link.symlink_to(place)
    # Without `site`, Python searches its own library and these folders only.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.run(
        [sys.executable, "-S", str(PROGRAM)], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    assert results["file"] == iiet.__file__
    assert results["missing"] == []
    assert results["losses"] == sorted(results["losses"], reverse=True)
    assert results["influences"] == [2, 1]
    assert results["distillation"] > 0
    assert results["generated"] == [1, 7]
    assert results["version"] == iiet.__version__ == metadata.version("iiet-orch")
    assert "pip install safetensors" in results["load"]
