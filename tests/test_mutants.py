"""The faults of `mutants.toml` can be put into the code as it is, and reach every test file."""

import tomllib
from pathlib import Path

from mutants import ROOT, read_mutants


def test_every_fault_replaces_one_text_and_names_tests_that_exist():
    assert read_mutants()


def test_every_test_file_is_named_by_a_fault_or_has_a_reason():
    tables = tomllib.loads(Path(__file__).with_name("mutants.toml").read_text("utf-8"))
    named = {test.partition("::")[0] for fault in tables["mutant"] for test in fault["tests"]}
    excused = {file for entry in tables["no_fault"] for file in entry["files"]}
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py")}
    assert files - named <= excused <= files
