"""The page: needs no network, escapes text from outside, and its scripts draw the charts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from browser import BROWSER, page_text
from refusals import assert_names
from sample_trials import sample_front

from iiet.iiad.pruning import InfluenceTable
from orchestrator.records.metrics import (
    ACCURACY,
    BITS_PER_BYTE,
    CONFIDENCE_KEEPS_99,
    CONFIDENCE_ON_FRONT,
    DECODE_MS,
    NFE,
    metric_of,
)
from orchestrator.reporting.findings import findings
from orchestrator.reporting.front import Front, FrontAxes, with_confidence
from orchestrator.reporting.results import StoredSweep
from orchestrator.reporting.sections import chart_scripts, render_page, sort_value
from orchestrator.reporting.sweep_report import ReportResult, names_explained


@pytest.fixture
def front(sample_results) -> Front:
    return sample_front(sample_results)


def page_of(front: Front, *, name: str = "toy", notes: Sequence[str] = (), **content: Any) -> str:
    """Return the page of a sweep; `content` are fields of the report or of the stored sweep."""
    stored = {name: content.pop(name) for name in ("influence", "facts") if name in content}
    report = ReportResult(
        title=name,
        sentences=("The headline.", *notes),
        notes=tuple(notes),
        folder=Path(),
        workspace=Path(),
        sweeps=(StoredSweep(name=name, key="key", results=(), **stored),),
        front=front,
        **content,
    )
    return render_page(report.title, report.sections())


def charts_in(page: str) -> list[dict[str, Any]]:
    match = re.search(r'id="charts">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return list(json.loads(match[1]))


@pytest.mark.slow
def test_the_page_needs_no_network(front):
    page = page_of(front)
    assert len(page) < 1_500_000
    without_scripts = page.replace(chart_scripts(), "").replace(
        "https://vega.github.io/schema/vega-lite", ""
    )
    assert not re.search(r"https?://|src=|@import|url\(", without_scripts)
    assert page.count("<tr class=") == len(front.placed)
    assert page == page_of(front), "the same results give the same bytes"


def test_a_line_below_the_headline_says_what_names_and_nfe_are(front):
    shown = re.sub(r"<[^>]+>", " ", page_of(front).partition('class="chart"')[0])
    headline, _, line = shown.partition("The headline.")
    assert "toy" in headline
    assert_names(line, "A name such as 3,2,2,1,1,1 counts the corrections of each layer", "NFE")
    assert names_explained(sample_front([])).startswith("NFE")


def test_text_from_outside_cannot_become_markup(sample_results):
    bad = "</script><script>alert(1)</script>"
    renamed = sample_results[1].model_copy(update={"label": bad})
    metric: Any = bad
    rows = ((0.1,),)
    page = page_of(
        sample_front([renamed]),
        name=bad,
        notes=[bad],
        influence=InfluenceTable(metric=metric, value_rows=rows, error_rows=rows, num_tokens=64),
        curves={bad: [(bad, [(0, 1.0), (1, 2.0)])]},
        facts={bad: {bad: bad}},
    )
    page = page.replace(chart_scripts(), "")
    assert "<script>alert" not in page
    assert page.count("</script>") == 3
    assert bad in json.dumps(charts_in(page))


@pytest.mark.slow
def test_a_page_folds_details_and_a_phone_shows_what_matters(sample_results, sample_evaluations):
    sweep_of = {r.key: "a & b" if n % 2 else "second" for n, r in enumerate(sample_results)}
    front = sample_front(sample_results, sweep_of=sweep_of)
    page = page_of(with_confidence(front, sample_evaluations))
    folded = re.findall(r"<summary>(.*?)</summary>", page)
    assert len(folded) == 4
    assert page.index("<h1>") < page.index('<p class="first">') < page.index('class="chart"')
    assert page.count("<tr class=") == 4 * len(front.placed)
    assert "a &amp; b" in page
    titles = re.findall(
        r'<th class="(?![^"]*minor)[^"]*"><button>(.*?)<', page.partition("</thead>")[0]
    )
    assert titles == ["schedule", "sweep", "NFE", "accuracy %", "of teacher", "front"]
    for cells in (["900 B", "6 KiB", "1.5 MiB", "1 GiB"], ["8.6 K", "340 M", "1.34 B"]):
        assert sorted(cells, key=lambda text: float(sort_value(text))) == cells


@pytest.mark.slow
def test_the_sentences_of_each_pair_of_axes_are_on_the_page(sample_results, sample_evaluations):
    front = with_confidence(sample_front(sample_results), sample_evaluations)
    page = page_of(front, notes=["A note."])
    chart = charts_in(page)[0]
    name_of = {metric_of(name).title: name for name in front.placed[0].numbers}
    sentences_of_axes = {
        (name_of[view["cost"]], name_of[view["quality"]]): view["sentences"]
        for view in chart["views"]
    }
    selects = re.findall("<select>(.*?)</select>", page)
    menus = [re.findall("<option>(.*?)<", select) for select in selects]
    assert len(sentences_of_axes) == len(menus[0]) * len(menus[1]) == len(chart["views"])
    first = chart["views"][chart["first"]]
    assert (name_of[first["cost"]], name_of[first["quality"]]) == (NFE, ACCURACY)
    assert sentences_of_axes[NFE, ACCURACY] == ["The headline.", "A note."], "those of the report"
    for (cost, quality), sentences in sentences_of_axes.items():
        assert sentences[1] == "A note."
        if (cost, quality) != (NFE, ACCURACY):
            of_axes = front.on(FrontAxes(cost, quality))
            assert [sentences[0], *sentences[2:]] == findings(of_axes)
    assert "decoding time" in sentences_of_axes[DECODE_MS, ACCURACY][0]
    assert "bits per byte" in sentences_of_axes[NFE, BITS_PER_BYTE][0]
    # The draws of a quality hold for every cost, but who is on the front does not.
    on_time = front.on(FrontAxes(DECODE_MS, ACCURACY))
    assert on_time.intervals == front.intervals
    assert CONFIDENCE_KEEPS_99 in on_time.placed[0].numbers
    assert CONFIDENCE_ON_FRONT not in on_time.placed[0].numbers
    in_bits = front.on(FrontAxes(NFE, BITS_PER_BYTE))
    assert not in_bits.intervals
    assert not any(name.startswith("paired/") for model in in_bits.models for name in model.numbers)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_draws_front_and_curves(sample_results, tmp_path):
    sweep_of = {r.key: "first" if n % 2 else "second" for n, r in enumerate(sample_results)}
    front = sample_front(sample_results, sweep_of=sweep_of)
    curves = {"Validation loss": [("a", [(0, 3.0), (10, 2.0)]), ("b", [(0, 3.0), (10, 1.0)])]}
    path = tmp_path / "front.html"
    path.write_text(page_of(front, curves=curves), encoding="utf-8")
    dom = page_text(path.as_uri(), tmp_path / "profile")
    assert 'data-ready="yes"' in dom
    assert dom.count('<svg xmlns="http://www.w3.org/2000/svg"') == 2
    lines = re.findall(r'<path (?![^>]*transform=)[^>]*d="M[^"]*L[^"]*"[^>]*>', dom)
    widths = [
        re.findall(r'stroke-width="([\d.]+)"', line)[0] for line in lines if "stroke-w" in line
    ]
    assert widths.count("2") == 1, "the front of all"
    assert widths.count("1.8") == 2, "two curves"
    assert dom.count("<select") == 2, "menus of the axes"
    assert {"first", "second", "teacher"} <= set(re.findall(r"<text[^>]*>([^<]*)<", dom))

    # A reader chooses another quality.
    choose = """<script>Promise.all(drawn).then(() => {
        const quality = document.querySelectorAll(".menus select")[1];
        quality.value = "Bits per byte";
        quality.dispatchEvent(new Event("change"));
    });</script>"""
    path.write_text(f"{page_of(front)}{choose}", encoding="utf-8")
    dom = page_text(path.as_uri(), tmp_path / "profile")
    assert "Bits per byte" in re.findall(r"<text[^>]*>([^<]*)<", dom), "title of the axis"
    in_bits = findings(front.on(FrontAxes(NFE, BITS_PER_BYTE)))
    assert in_bits[0] in unescape(dom)
