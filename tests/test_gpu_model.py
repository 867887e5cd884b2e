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


def estimate(folder: Path, *options: str, layers: int = 2) -> list[dict[str, Any]]:
    """Return the numbers of `python -m benchmarks.gpu_model 340m`."""
    file = folder / "numbers.json"
    command = [sys.executable, "-m", "benchmarks.gpu_model", "340m", "--layers", str(layers)]
    subprocess.run([*command, *options, "--json", str(file)], cwd=ROOT, check=True)
    results: list[dict[str, Any]] = json.loads(file.read_text())
    return results


def launches(numbers: dict[str, Any], word: str) -> int:
    return sum(line["launches"] for line in numbers["by_kernel"] if word in line["name"])


def check_step(numbers: dict[str, Any], *, most_kernels: int) -> None:
    """Check what every step has: one wait, bf16 except in the mix, about the planned memory.

    `most_kernels` is 3 % above what was traced when the test was written.
    """
    assert numbers["waits"] == 1, numbers["waits_by_place"]
    assert numbers["attention"].keys() == {"bfloat16"}
    assert numbers["products"]["bfloat16"] > 0.999 * sum(numbers["products"].values())
    assert numbers["peak_gib"] == pytest.approx(numbers["planned_gib"], rel=0.1)
    assert numbers["kernels"] <= most_kernels


def test_a_training_step(tmp_path: Path) -> None:
    eager, compiled = estimate(tmp_path, "--passes", "2")
    check_step(eager, most_kernels=1200)
    check_step(compiled, most_kernels=1100)
    for numbers in (eager, compiled):
        # Of two passes, two layers and four evaluations.
        assert launches(numbers, "flash_attention") == 2 * 2 * 2 * 4
    # Two norms per evaluation, and the last norm of each pass.
    assert launches(eager, "_fused_rms_norm") == 2 * 2 * (2 * 4 * 2 + 1)
    assert compiled["mfu"] > 1.05 * eager["mfu"]


def test_a_distillation_step(tmp_path: Path) -> None:
    eager, compiled = estimate(tmp_path, "--distill", "1")
    check_step(eager, most_kernels=855)
    check_step(compiled, most_kernels=830)
    # Of two layers: the teacher's four evaluations, and the student's two, forward and backward.
    assert launches(eager, "flash_attention") == 2 * (4 + 2 * 2)


@pytest.mark.long
def test_the_goals_at_full_size(tmp_path: Path) -> None:
    eager, compiled = estimate(tmp_path, layers=24)
    assert eager["kernels"] <= 6200
    assert eager["milliseconds"] <= 295
    assert compiled["mfu"] >= 0.30
    for numbers in (eager, compiled):
        assert numbers["peak_gib"] <= 34
        assert numbers["peak_gib"] == pytest.approx(numbers["planned_gib"], rel=0.1)


def test_decoded_tokens(tmp_path: Path) -> None:
    (numbers,) = estimate(tmp_path, "--decode", "4")
    # After the first step, and then after each eighth one, logits must be finite.
    assert numbers["waits"] == 1, numbers["waits_by_place"]
    num_evaluations = 4 * 2 * 4
    # A fused kernel serves the mask.
    assert launches(numbers, "efficient_attention") == num_evaluations
    files = ("token_step.py", "rope.py:turn_", "cache.py", "attention.py")
    in_fields = [
        line["launches"]
        for line in numbers["by_place"]
        if any(file in line["name"] for file in files)
    ]
    assert sum(in_fields) <= 14 * num_evaluations
    assert numbers["kernels"] <= 20 * num_evaluations  # With mix, norms and the head.
