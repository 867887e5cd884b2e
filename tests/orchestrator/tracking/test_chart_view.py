"""A saved chart view is JSON that fits into a tag of MLflow."""

from __future__ import annotations

import json

import pytest

from orchestrator.tracking.chart_view import ChartView
from orchestrator.tracking.store import tag_filter


def chart_view(**changes: object) -> ChartView:
    values: dict[str, object] = {
        "key": "front-toy",
        "name": "Front of toy",
        "run_filter": tag_filter({"iiet.sweep": "toy"}),
        "order_by": "metrics.cost/evaluations",
        "columns": ("metrics.cost/evaluations", "params.schedule"),
        "scatters": (("cost/evaluations", "quality/accuracy"),),
        "parallel_params": ("r_01", "r_02"),
        "parallel_metrics": ("quality/accuracy",),
        "curves": ("train/loss",),
        "folded_groups": ("cost", "quality"),
    }
    return ChartView(**{**values, **changes})  # type: ignore[arg-type]


def test_a_view_holds_filter_axes_and_every_layer() -> None:
    tag = json.loads(chart_view().tag[1])
    state = json.loads(tag["state"])
    assert tag["name"] == "Front of toy"
    assert state["searchFilter"] == "tags.`iiet.sweep` = 'toy'"
    kinds = [chart["type"] for chart in state["compareRunCharts"]]
    # Our charts come first; otherwise MLflow sorts its own between them.
    assert state["isAccordionReordered"]
    assert [s["display"] for s in state["compareRunSections"]] == [True, False, False]
    assert kinds == ["SCATTER", "PARALLEL", "LINE"]
    scatter, parallel, line = state["compareRunCharts"]
    assert scatter["xaxis"]["key"] == "cost/evaluations"
    assert scatter["yaxis"]["key"] == "quality/accuracy"
    assert parallel["selectedParams"] == ["r_01", "r_02"]
    # A smoothed curve shows other values than the run has.
    assert (line["lineSmoothness"], line["useGlobalLineSmoothing"]) == (0, False)
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`cost/evaluations`", True)
    newest = chart_view(order_by="attributes.created", is_ascending=False).state()
    assert (newest["orderByKey"], newest["orderByAsc"]) == ("attributes.created", False)
    assert chart_view().state() == state, "saving a view again gives the same charts"
    section = state["compareRunSections"][0]["uuid"]
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == {section}


def test_a_view_too_large_for_a_tag_is_an_error() -> None:
    with pytest.raises(ValueError, match="20000 characters"):
        _ = chart_view(parallel_params=[f"r_{n:05d}" for n in range(5000)]).tag
