"""Every measured number of README and research/results.md comes from a JSON file of the ledger."""

import re

import ledger
import pytest
from ledger import BLOCK, PAGES, ROOT, filled, measured_outside


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_of_a_page_are_those_of_its_files(name):
    text = (ROOT / name).read_text("utf-8")
    assert len(BLOCK.findall(text)) == text.count("<!-- end -->") >= 1
    assert filled(text) == text, "python research/ledger.py writes them"
    assert measured_outside(text) == []


def test_a_changed_number_and_one_without_a_source_are_noticed():
    text = (ROOT / PAGES[0]).read_text("utf-8")
    number = re.search(r"[0-9.]+ ± ", text)
    assert number
    assert filled(text.replace(number[0], "12.3 ± ")) == text
    assert measured_outside(f"{text}\nIt keeps 98 % of it.\n") == ["It keeps 98 % of it."]


def test_each_file_is_on_a_page():
    files = {f"research/fronts/{path.name}" for path in (ROOT / "research/fronts").iterdir()}
    named = {each["file"] for name in PAGES for each in BLOCK.finditer((ROOT / name).read_text())}
    assert named == files
    assert set(ledger.TABLES) == {
        each["table"] for name in PAGES for each in BLOCK.finditer((ROOT / name).read_text())
    }
