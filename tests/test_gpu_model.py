"""Training and decoding as a GPU would run them: types, kernels, memory and waits, without a GPU.

Each trace runs in a process of its own, because a pretended GPU changes the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_model.stub import missing_compiler

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_compiler()), reason=missing_compiler() or "-"),
]


def estimate(folder: Path, *options: str) -> dict[str, Any]:
    """Return the numbers of `python -m benchmarks.gpu_model 340m` with two layers."""
    file = folder / "numbers.json"
    command = [sys.executable, "-m", "benchmarks.gpu_model", "340m", "--layers", "2", *options]
    subprocess.run([*command, "--json", str(file)], cwd=ROOT, check=True)
    (numbers,) = json.loads(file.read_text())
    return numbers


def launches(numbers: dict[str, Any]) -> dict[str, int]:
    return {line["name"]: line["launches"] for line in numbers["by_kernel"]}


def test_a_training_step(tmp_path: Path) -> None:
    numbers = estimate(tmp_path, "--passes", "2")
    assert numbers["waits"] <= 2 + 1, numbers["waits_by_place"]
    assert numbers["peak_gib"] == pytest.approx(numbers["planned_gib"], rel=0.1)
    # Two passes, two layers, four evaluations with two norms each; and the last norm.
    assert launches(numbers)["_fused_rms_norm"] == 2 * (2 * 4 * 2 + 1)
    assert numbers["attention"].keys() == {"bfloat16"}
    # The mix stays in float32.
    assert numbers["products"]["bfloat16"] > 0.999 * sum(numbers["products"].values())
