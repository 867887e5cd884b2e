"""Links open MLflow's training pages."""

from __future__ import annotations

from orchestrator.tracking.tracker import page_links


def test_links_open_the_training_pages() -> None:
    pages = {"run_id": "abc", "view": "front-toy", "report": "front/front.html"}
    runs = "http://127.0.0.1:5000/#/experiments/3/runs"
    assert page_links("http://127.0.0.1:5000/", "3", **pages) == {
        "charts": (
            f"{runs}?workflowType=machine_learning"
            "&compareRunsMode=CHART&viewStateShareKey=front-toy"
        ),
        "table": (
            f"{runs}?workflowType=machine_learning"
            "&compareRunsMode=TABLE&viewStateShareKey=front-toy"
        ),
        "report": f"{runs}/abc/artifacts/front/front.html?workflowType=machine_learning",
        "run": f"{runs}/abc?workflowType=machine_learning",
    }
    assert page_links("http://x", "3", run_id="abc").keys() == {"run"}


def test_a_path_before_the_pages_is_kept() -> None:
    links = page_links("https://host/team/mlflow/", "3", run_id="abc", view="v", report="r.html")
    assert len(links) == 4
    start = "https://host/team/mlflow/#/experiments/3/"
    assert all(link.startswith(start) for link in links.values())
