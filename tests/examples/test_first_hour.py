"""The notebook runs as it is, and is stored without outputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "first_hour.ipynb"


def read_notebook() -> Any:
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_without_outputs():
    import nbformat

    notebook = read_notebook()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


@pytest.mark.long
def test_it_runs(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv(
        "PYTHONPATH", f"{NOTEBOOK.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read_notebook()
    NotebookClient(
        notebook,
        timeout=800,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    errors = [output for output in outputs if output.output_type == "error"]
    assert not errors
    shown = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 1, "the losses"
    [front] = [data["text/html"] for data in shown if "<svg" in data.get("text/html", "")]
    assert "teacher" in front
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "nats per token on held-out text" in printed
    assert printed.count("layer 2, correction 2: moved by ") == 1
    logged = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
    assert "raylet" not in logged
    assert "experiment_analysis" not in logged
    lines = printed + "".join(data.get("text/plain", "") for data in shown)
    for task in ("pretrain", "influence (cosine)", "sweep", "report", "export", "evaluate"):
        assert f"{task}: " in lines, "progress"
