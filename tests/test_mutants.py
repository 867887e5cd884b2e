"""The faults of `mutants.toml` can be put into the code as it is."""

from mutants import read_mutants


def test_every_fault_replaces_one_text_and_names_tests_that_exist():
    assert read_mutants()
