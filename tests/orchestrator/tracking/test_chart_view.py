"""A saved chart view is JSON that fits into a tag of MLflow."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from orchestrator.tracking.chart_view import ChartView


def test_a_view_holds_filter_axes_and_every_layer():
    view = ChartView(
        key="front-toy",
        name="Front of toy",
        run_filter="tags.`iiet.sweep` = 'toy'",
        order_by="metrics.cost/evaluations",
        columns=("metrics.quality/accuracy", "tags.iiet.sweep", "metrics.cost/evaluations"),
        scatters=(("cost/evaluations", "quality/accuracy"),),
        parallel_params=("r_01", "r_02"),
        curves=("train/loss",),
        folded_groups=("cost", "quality"),
    )
    name, text = view.tag
    tag = json.loads(text)
    state = json.loads(tag["state"])
    assert (name, tag["name"]) == ("mlflow.sharedViewState.front-toy", "Front of toy")
    assert state["searchFilter"] == view.run_filter
    # Without an order, MLflow would sort costs before qualities.
    ids = ["metrics.`quality/accuracy`", "tags.`iiet.sweep`", "metrics.`cost/evaluations`"]
    assert state["selectedColumns"] == ids
    assert state["columnOrder"][-3:] == ids
    assert [*state["columnWidths"]] == ["tags.`iiet.sweep`"]
    # Our charts come first; otherwise MLflow sorts its own between them.
    assert state["isAccordionReordered"]
    assert [s["display"] for s in state["compareRunSections"]] == [True, True, False, False]
    scatter, parallel, line = state["compareRunCharts"]
    assert [c["type"] for c in (scatter, parallel, line)] == ["SCATTER", "PARALLEL", "LINE"]
    axes = (scatter["xaxis"]["key"], scatter["yaxis"]["key"])
    assert axes == ("cost/evaluations", "quality/accuracy")
    assert parallel["selectedParams"] == ["r_01", "r_02"]
    # A smoothed curve shows other values than the run has.
    assert (line["lineSmoothness"], line["useGlobalLineSmoothing"]) == (0, False)
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`cost/evaluations`", True)
    assert view.state() == state, "saving a view again gives the same charts"
    front, corrections, *_ = state["compareRunSections"]
    assert scatter["metricSectionId"] == line["metricSectionId"] == front["uuid"]
    # Alone and wide, or the titles of six layers cover each other.
    assert (parallel["metricSectionId"], corrections["columns"]) == (corrections["uuid"], 1)
    with pytest.raises(ValueError, match="20000 characters"):
        _ = replace(view, parallel_params=[f"r_{n:05d}" for n in range(5000)]).tag
