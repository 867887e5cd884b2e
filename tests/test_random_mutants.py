"""A change of the code is one expression, and the tests that run it are known."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest
from random_mutants import RECORD_VARIABLE, ROOT, changes_of, functions_of

CODE = '''\
"""Ä text before it: 1 + 2."""

LIMIT = 3


class Wide:
    @property
    def size(self, least: int = 4) -> int:
        """Return 5."""
        é, ö = 1, -self.width  # Two bytes each.
        if not least < é <= ö:
            raise ValueError(f"{least + 1} is too much")
        return call(least, ö, flag=True) // max(é, ö)
'''


def test_each_change_replaces_an_expression_that_is_computed():
    [(function, name)] = functions_of(ast.parse(CODE))
    assert name == "Wide.size"
    changes = changes_of("wide.py", CODE, name, function)
    assert {change.function_line for change in changes} == {7}
    replaced = [(change.line, CODE[change.start : change.end], change.new) for change in changes]
    assert sorted(replaced) == [
        (10, "-self.width", "(+self.width)"),
        (10, "1", "2"),
        (11, "least < é <= ö", "(least < é < ö)"),
        (11, "least < é <= ö", "(least <= é <= ö)"),
        (11, "not least < é <= ö", "(least < é <= ö)"),
        (13, "True", "False"),
        (13, "call(least, ö, flag=True)", "(call(least, ö))"),
        (13, "call(least, ö, flag=True)", "(call(ö, least, flag=True))"),
        (13, "call(least, ö, flag=True) // max(é, ö)", "(call(least, ö, flag=True) * max(é, ö))"),
    ]
    for change in changes:
        assert ast.dump(ast.parse(change.apply(CODE))) != ast.dump(ast.parse(CODE))


@pytest.mark.slow
def test_lines_are_recorded_for_each_test_that_runs_them_also_in_shared_fixtures(tmp_path):
    (tmp_path / "test_recorded.py").write_text(
        "import threading, pytest\n"
        "from iiet.model.schedule import IterationSchedule\n"
        "@pytest.fixture(scope='module')\n"
        "def shared(): return IterationSchedule((1, 2)).num_evaluations\n"
        "def test_first(shared): pass\n"
        "def test_second(shared): pass\n"
        "def test_alone():\n"
        "    thread = threading.Thread(target=lambda: IterationSchedule((1,)).num_evaluations)\n"
        "    thread.start(); thread.join()\n"
        "def test_nothing(): pass\n"
    )
    record = tmp_path / "record.json"
    program = (
        "import os, sys, pytest; sys.path[:0] = sys.argv[1:3]; "
        f"os.environ[{RECORD_VARIABLE!r}] = sys.argv[3]; "
        "sys.exit(pytest.main(['-q', '-p', 'random_mutants', '-p', 'no:cacheprovider', '-c', "
        "os.devnull, sys.argv[4]]))"
    )
    process = subprocess.run(
        [
            sys.executable, "-c", program, str(ROOT), str(ROOT / "tests"), str(record),
            str(tmp_path / "test_recorded.py"),
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    tests = json.loads(record.read_text())
    run = {name.partition("::")[2]: test["lines"] for name, test in tests.items()}
    assert run["test_first"] == run["test_second"] != []
    assert {file for file, _ in run["test_first"]} == {"iiet/model/schedule.py"}
    assert run["test_alone"] == run["test_first"]
    assert run["test_nothing"] == []
