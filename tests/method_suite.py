"""Runs the tests that every method must pass on a method of another package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEWEST_TESTS = 12


def assert_passes_suite(method: str, site: Path) -> None:
    """Run `test_laws.py` on one method, with a folder of installed packages."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", method),
            str(ROOT / "tests" / "iiet" / "test_laws.py"),
        ],
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) > FEWEST_TESTS
