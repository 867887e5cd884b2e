"""HTML page: needs no network, escapes text from outside, and its scripts draw the front."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sample_trials import sample_front, sample_trial

from iiet.influence import InfluenceTable
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.trial import Trial
from orchestrator.reporting.confidence import with_confidence
from orchestrator.reporting.front_axes import FrontAxes
from orchestrator.reporting.html_page import render_page
from orchestrator.reporting.html_tables import _sort_value, models_table, schedule_strip
from orchestrator.reporting.pareto import Front
from orchestrator.reporting.report_content import SweepReport

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def front(sample_results: list[Trial]) -> Front:
    return sample_front(sample_results)


def page_of(front: Front, **content: Any) -> str:
    return render_page(SweepReport(name="toy", front=front, **content))


def data_in(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def test_the_page_needs_no_network(front: Front) -> None:
    page = page_of(front)
    without_names = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|src=|@import|url\(", without_names)
    assert page.count("<tr class=") == len(front.points)


def test_text_from_outside_cannot_become_markup(sample_results: list[Trial]) -> None:
    bad = "</script><script>alert(1)</script>"
    renamed = sample_results[1].model_copy(update={"label": bad})
    metric: Any = bad
    rows = ((0.1,),)
    influence = InfluenceTable(metric=metric, value_rows=rows, error_rows=rows, num_tokens=64)
    report = SweepReport(
        name=bad,
        front=sample_front([renamed]),
        notes=[bad],
        influence=influence,
        curves={bad: [(bad, [(0, 1.0), (1, 2.0)])]},
        facts={bad: {bad: bad}},
    )
    page = render_page(report)
    assert "<script>alert" not in page
    assert page.count("</script>") == 2
    assert bad in json.dumps(data_in(page)["curves"])


def test_tasks_and_sweeps_are_distinguished(
    sample_results: list[Trial], sample_evaluations: dict[str, EvaluationResult]
) -> None:
    sweep_of = {r.key: "a & b" if n % 2 else "second" for n, r in enumerate(sample_results)}
    front = sample_front(sample_results, sweep_of=sweep_of)
    page = page_of(with_confidence(front, sample_evaluations, num_resamples=100))
    assert page.count("<details") == 3
    assert page.count("<tr class=") == 4 * len(front.points)
    assert "a &amp; b" in page
    data = data_in(page)
    assert set(data["series"]) == {"a & b", "second"}
    assert {"paired/vs_teacher", "paired/confidence_on_front"} <= set(data["hover"])
    assert all(name in data["rows"][0] for name in data["hover"] if name.startswith("paired/"))


def test_a_phone_shows_the_most_important_columns(
    sample_results: list[Trial], sample_evaluations: dict[str, EvaluationResult]
) -> None:
    front = with_confidence(sample_front(sample_results), sample_evaluations, num_resamples=100)
    titles = re.findall(r'<th class="(?![^"]*minor)[^"]*"><button>(.*?)<', models_table(front))
    assert titles == ["schedule", "NFE", "ms/token", "accuracy %", "of full", "front"]


def test_the_page_has_the_front_of_every_pair_of_axes(sample_results: list[Trial]) -> None:
    changes = {"key": "new", "numbers": {"cost/evaluations": 1.0}}
    unmeasured = sample_results[1].model_copy(update=changes)
    results = [*sample_results, unmeasured]
    sweep_of = {r.key: "first" if n % 2 else "second" for n, r in enumerate(results)}
    data = data_in(page_of(sample_front(results, sweep_of=sweep_of)))
    keys = [row["key"] for row in data["rows"]]
    assert set(data["fronts"]) == set(data["costs"]) >= {"cost/evaluations", "cost/flops_per_token"}
    for cost, by_quality in data["fronts"].items():
        assert set(by_quality) == set(data["qualities"])
        for quality, found in by_quality.items():
            expected = sample_front(results, FrontAxes(cost, quality), sweep_of=sweep_of)
            members = [point.result.key for point in expected.members]
            assert [keys[number] for number in found["members"]] == members
            assert keys[found["full"]] == "7e1c0ffee0000000"
            assert [[keys[number] for number in own] for own in found["sweeps"]] == [
                [point.result.key for point in expected.by_sweep[name].members]
                for name in data["series"]
            ]


def test_a_model_with_an_infinite_number_is_not_drawn() -> None:
    costs = {"a": 1.0, "b": 2.0}
    results = [
        sample_trial(
            key=key,
            role="trial",
            method="iiet",
            cost={"evaluations": cost},
            quality={"accuracy": cost, "validation_loss": math.inf if key == "a" else 1.0},
        )
        for key, cost in costs.items()
    ]
    data = data_in(page_of(sample_front(results)))
    found = data["fronts"]["cost/evaluations"]["quality/validation_loss"]
    assert [data["rows"][number]["key"] for number in found["members"]] == ["b"]


def test_a_strip_has_a_cell_for_each_layer() -> None:
    assert re.findall(r">(\d)</i>", schedule_strip((2, 0, 1))) == ["2", "0", "1"]
    assert schedule_strip(None) == ""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_distinguishes_sweeps_and_marks_the_paper(
    sample_results: list[Trial], tmp_path: Path
) -> None:
    sweep_of = {r.key: "first" if n % 2 else "second" for n, r in enumerate(sample_results)}
    front = sample_front(sample_results, sweep_of=sweep_of)
    path = tmp_path / "front.html"
    path.write_text(page_of(front), encoding="utf-8")
    dom = read_in_browser(path.as_uri(), tmp_path / "profile")
    assert 'data-ready="yes"' in dom
    paths = re.findall(r'<path d="M[^"]*H[^"]*" fill="none"([^>]*)>', dom)
    assert len(paths) == 3  # the front of each sweep, and that of all
    assert sum('opacity="0.45"' in look for look in paths) == 2
    assert dom.count('class="paper"') == 1
    assert re.search(r'id="series">.*first.*second', dom) or re.search(
        r'id="series">.*second.*first', dom
    )


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_draws_front_and_curves(front: Front, tmp_path: Path) -> None:
    curves = {"Validation loss": [("a", [(0, 3.0), (10, 2.0)]), ("b", [(0, 3.0), (10, 1.0)])]}
    path = tmp_path / "front.html"
    path.write_text(page_of(front, curves=curves), encoding="utf-8")
    dom = read_in_browser(path.as_uri(), tmp_path / "profile")
    assert 'data-ready="yes"' in dom
    assert dom.count('class="point"') == len(front.points)
    assert dom.count("<polygon") == 1  # the full model's star
    assert dom.count("<polyline") == 2
    assert re.search(r'<path d="M[\d.]+,[\d.]+(H[\d.]+V[\d.]+)+H[\d.]+"', dom)


def read_in_browser(url: str, profile: Path) -> str:
    """Return the page's elements after its scripts ran."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", f"--user-data-dir={profile}", "--virtual-time-budget=5000"),
        *("--dump-dom", url),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_cells_with_units_are_sorted_by_size() -> None:
    for cells in (["900 B", "6 KiB", "1.5 MiB", "1 GiB"], ["8.6 K", "340 M", "1.34 B"]):
        assert sorted(cells, key=lambda text: float(_sort_value(text))) == cells
