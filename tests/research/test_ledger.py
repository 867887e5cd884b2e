"""Every measured number of README and research/results.md comes from a JSON file of the ledger."""

import json
import re

import ledger
import pytest
from ledger import BLOCK, NOT_PICTURED, PAGES, PICTURED, ROOT, filled, measured_outside, panels


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_of_a_page_are_those_of_its_files(name):
    text = (ROOT / name).read_text("utf-8")
    assert len(BLOCK.findall(text)) == text.count("<!-- end -->") >= 1
    assert filled(text) == text, "python research/ledger.py writes them"
    assert measured_outside(text) == []


def test_a_changed_number_and_one_without_a_source_are_noticed():
    text = (ROOT / PAGES[1]).read_text("utf-8")
    number = re.search(r"[0-9.]+ ± ", text)
    assert number
    assert filled(text.replace(number[0], "12.3 ± ")) == text
    assert measured_outside(f"{text}\nIt keeps 98 % of it.\n") == ["It keeps 98 % of it."]


def test_each_file_is_on_a_page():
    files = {f"research/fronts/{path.name}" for path in (ROOT / "research/fronts").iterdir()}
    blocks = [block for name in PAGES for block in BLOCK.finditer((ROOT / name).read_text("utf-8"))]
    named = {file for block in blocks for file in block["files"].split(", ")}
    studies = ("retrofit_study", "retrofit_pilot", "optimizer_study", "cheaper_recovery")
    assert named == {*files, *(f"research/{name}.json" for name in studies)}
    assert set(ledger.TABLES) == {block["table"] for block in blocks}


def test_a_difference_holds_if_its_interval_is_above_zero_and_better_means_fewer_bits():
    row = {"name": "a", "paired/vs_b": -0.2, "paired/vs_b_low": -0.3, "paired/vs_b_high": -0.1}
    cells = {}
    for axis in ("quality/accuracy", "quality/bits_per_byte"):
        basis = {"num_seeds": 3 if axis == "quality/accuracy" else 1}
        report = {"axes": {"quality": axis}, "results": [row], "confidence_basis": basis}
        cells[axis] = ledger.difference_cells(report, "a", "vs_b")
    assert cells["quality/accuracy"] == [
        "-20.0 points (-30.0 to -10.0, over seeds and items)",
        "does not hold",
    ]
    assert cells["quality/bits_per_byte"] == [
        "0.200 bits per byte (0.100 to 0.300, over items of one seed)",
        "holds",
    ]
    unsure = {**report, "results": [{**row, "paired/vs_b_high": 0.1}]}
    assert ledger.difference_cells(unsure, "a", "vs_b")[1] == "not decided"


@pytest.mark.parametrize(
    ("answer", "short"),
    [
        ("**holds**: 13.5 points (11.1 to 15.9, over seeds and items)", "holds: 13.5 points"),
        ("**not decided**: +5.7 % (+3.3 to +8.1), after 40 steps", "not decided: +5.7 %"),
        ("**says nothing**: the teacher does not beat r = 0", "says nothing"),
        (ledger.UNKNOWN, ledger.UNKNOWN),
    ],
)
def test_a_short_answer_has_the_verdict_and_the_number(answer, short):
    assert ledger.short_answer(answer) == short


def test_a_cell_of_the_readme_has_at_most_five_words():
    [block] = BLOCK.finditer((ROOT / PAGES[0]).read_text("utf-8"))
    assert block["table"] == "summary"
    rows = [line for line in block[0].splitlines() if line.startswith("| ")][2:]
    assert 1 <= len(rows) <= 6
    assert all(len(cell.split()) <= 5 for row in rows for cell in row.strip("|").split("|"))


@pytest.mark.slow
def test_the_picture_names_every_baseline_that_it_shows():
    for name, chart in zip(PICTURED, panels(), strict=True):
        report = json.loads((ROOT / "research" / "fronts" / f"{name}.json").read_text("utf-8"))
        baselines = {row["name"] for row in report["results"] if row["role"] != "trial"}
        names = chart["datasets"]["names"]
        on_screens = {name["name"] for name in names if not name["is_on_phone"]}
        assert baselines - set(NOT_PICTURED) <= on_screens
        assert not set(NOT_PICTURED) & on_screens


@pytest.mark.slow
def test_the_pictures_are_drawn(tmp_path):
    ledger.draw_picture(tmp_path / "fronts.png")
    ledger.draw_cheaper_front(tmp_path / "cheaper-front")
    for name in ("fronts", "cheaper-front"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
