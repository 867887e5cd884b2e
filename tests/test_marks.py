"""The marks of tests: what `make test`, `make test-quick` and `make test-long` select."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALLS = "tests/behaviour/test_empty_environments.py"
LONG = "tests/behaviour/test_depth_sweep.py"
"""A file whose tests all have one mark only."""


def collected(*arguments: str) -> int:
    """Return how many tests pytest selects."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 5), done.stdout + done.stderr  # 5: no test selected
    return done.stdout.count("::")


@pytest.mark.slow
def test_long_tests_are_slow_too_and_those_that_install_are_long() -> None:
    files = (LONG, INSTALLS)
    assert collected("-m", "not slow", *files) == 0
    assert collected("-m", "slow and long", *files) == collected("-m", "", *files) > 0
