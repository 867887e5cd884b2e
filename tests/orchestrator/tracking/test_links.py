"""Links open MLflow's training pages."""

from __future__ import annotations

from orchestrator.tracking.links import Links


def test_links_open_the_training_pages() -> None:
    pages = {"run_id": "abc", "view": "front-toy", "report": "front/front.html"}
    links = Links.of("http://127.0.0.1:5000/", "3", **pages)
    assert links.training_view == (
        "http://127.0.0.1:5000/#/experiments/3/runs?workflowType=machine_learning"
    )
    assert links.run is not None
    assert "/runs/abc?" in links.run
    assert links.chart_view is not None
    assert links.chart_view.endswith("&compareRunsMode=CHART&viewStateShareKey=front-toy")
    assert links.report is not None
    assert "/experiments/3/runs/abc/artifacts/front/front.html?" in links.report
    assert Links.of("http://x", "3", run_id="abc").report is None
    assert Links.of("http://x", None, **pages) == Links(None, None, None, None, None)


def test_a_path_before_the_pages_is_kept() -> None:
    links = Links.of("https://host/team/mlflow/", "3", run_id="abc", view="v", report="r.html")
    found = [link for link in vars(links).values() if link]
    assert len(found) == 5
    assert all(link.startswith("https://host/team/mlflow/#/experiments/3/") for link in found)
