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


SELECT = """
import sys, pytest

class Count:
    def pytest_collection_finish(self, session):
        print("selected", len(session.items))

for marks in ("", "not slow", "slow and long"):
    pytest.main(["--collect-only", "-q", "-m", marks, *sys.argv[1:]], plugins=[Count()])
"""


@pytest.mark.slow
def test_long_tests_are_slow_too_and_those_that_install_are_long() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SELECT, LONG, INSTALLS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("selected")]
    every, not_slow, slow_and_long = (int(line.split()[1]) for line in lines)
    assert not_slow == 0
    assert slow_and_long == every > 0
