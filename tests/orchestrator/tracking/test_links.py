"""Links name the training pages, and a saved view is JSON that MLflow can take."""

from __future__ import annotations

import json

import pytest

from orchestrator.tracking.chart_view import ChartView
from orchestrator.tracking.links import Links
from orchestrator.tracking.store import tag_filter


def a_view(**changes: object) -> ChartView:
    values: dict[str, object] = {
        "key": "front-toy",
        "name": "Front of toy",
        "run_filter": tag_filter({"iiet.sweep": "toy"}),
        "order_by": "cost/evaluations",
        "columns": ("metrics.cost/evaluations", "params.schedule"),
        "scatters": (("cost/evaluations", "quality/accuracy"),),
        "parallel_params": ("r_01", "r_02"),
        "parallel_metrics": ("quality/accuracy",),
        "curves": ("train/loss",),
        "folded_groups": ("cost", "quality"),
    }
    return ChartView(**{**values, **changes})  # type: ignore[arg-type]


def test_links_land_on_the_training_pages() -> None:
    links = Links.of("http://127.0.0.1:5000/", "3", run_id="abc", view="front-toy")
    assert links.training_view == (
        "http://127.0.0.1:5000/#/experiments/3/runs?workflowType=machine_learning"
    )
    assert links.run is not None
    assert "/runs/abc?" in links.run
    assert links.chart_view is not None
    assert links.chart_view.endswith("&compareRunsMode=CHART&viewStateShareKey=front-toy")
    assert Links.of("http://x", None, run_id="abc") == Links(None, None, None, None)


def test_a_view_holds_filter_axes_and_every_layer() -> None:
    tag = json.loads(a_view().tag_value())
    state = json.loads(tag["state"])
    assert tag["name"] == "Front of toy"
    assert state["searchFilter"] == "tags.`iiet.sweep` = 'toy'"
    kinds = [chart["type"] for chart in state["compareRunCharts"]]
    # Ours come first: else MLflow sorts its own between them.
    assert state["isAccordionReordered"]
    assert [s["display"] for s in state["compareRunSections"]] == [True, False, False]
    assert kinds == ["SCATTER", "PARALLEL", "LINE"]
    scatter, parallel, _ = state["compareRunCharts"]
    assert scatter["xaxis"]["key"] == "cost/evaluations"
    assert scatter["yaxis"]["key"] == "quality/accuracy"
    assert parallel["selectedParams"] == ["r_01", "r_02"]
    section = state["compareRunSections"][0]["uuid"]
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == {section}


def test_the_same_view_has_the_same_charts() -> None:
    assert a_view().state() == a_view().state()


def test_a_view_too_large_for_a_tag_is_an_error() -> None:
    with pytest.raises(ValueError, match="20000 characters"):
        a_view(parallel_params=[f"r_{n:05d}" for n in range(5000)]).tag_value()
