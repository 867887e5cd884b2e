"""Links open MLflow's training pages, also of a server below a path."""

from __future__ import annotations

from orchestrator.tracking.tracker import page_links


def test_links_open_the_training_pages() -> None:
    runs = "https://host/team/mlflow/#/experiments/3/runs"
    training, view = "workflowType=machine_learning", "viewStateShareKey=front-toy"
    pages = {"run_id": "abc", "view": "front-toy", "report": "front/front.html"}
    assert page_links("https://host/team/mlflow/", "3", **pages) == {
        "charts": f"{runs}?{training}&compareRunsMode=CHART&{view}",
        "table": f"{runs}?{training}&compareRunsMode=TABLE&{view}",
        "report": f"{runs}/abc/artifacts/front/front.html?{training}",
        "run": f"{runs}/abc?{training}",
    }
    assert page_links("http://x", "3", run_id="abc").keys() == {"run"}
