"""Links open MLflow's training pages."""

from __future__ import annotations

from orchestrator.tracking.links import Links


def test_links_open_the_training_pages() -> None:
    links = Links.of("http://127.0.0.1:5000/", "3", run_id="abc", view="front-toy")
    assert links.training_view == (
        "http://127.0.0.1:5000/#/experiments/3/runs?workflowType=machine_learning"
    )
    assert links.run is not None
    assert "/runs/abc?" in links.run
    assert links.chart_view is not None
    assert links.chart_view.endswith("&compareRunsMode=CHART&viewStateShareKey=front-toy")
    assert Links.of("http://x", None, run_id="abc") == Links(None, None, None, None)
