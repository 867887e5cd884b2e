"""The notebooks run as they are, and are stored without outputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def read_notebook(name: str) -> Any:
    import nbformat

    return nbformat.read(FOLDER / name, as_version=4)


@pytest.fixture
def outputs_of(tmp_path, monkeypatch) -> Callable[[str], list[Any]]:
    """Run a notebook in an empty folder; return the outputs of its cells."""

    def run(name: str) -> list[Any]:
        from nbclient import NotebookClient

        monkeypatch.setenv(
            "PYTHONPATH", f"{FOLDER.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        )
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
        notebook = read_notebook(name)
        NotebookClient(
            notebook,
            timeout=800,
            kernel_name="python3",
            resources={"metadata": {"path": str(tmp_path)}},
        ).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        assert not [output for output in outputs if output.output_type == "error"]
        return outputs

    return run


def printed(outputs: list[Any]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.ipynb")))
def test_they_are_stored_without_outputs(name):
    import nbformat

    notebook = read_notebook(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


@pytest.mark.slow
def test_the_one_of_the_library_runs(outputs_of):
    outputs = outputs_of("library.ipynb")
    shown = [output.data for output in outputs if "data" in output]
    tables = [data["text/html"] for data in shown if "text/html" in data]
    assert ["<th>NFE</th>" in table for table in tables] == [False, True]
    assert shown[-1]["text/plain"] == "True"
    assert "the student" in printed(outputs)


@pytest.mark.long
def test_the_one_of_the_first_hour_runs(outputs_of):
    outputs = outputs_of("first_hour.ipynb")
    shown = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 1, "the losses"
    [front] = [data["text/html"] for data in shown if "<svg" in data.get("text/html", "")]
    assert "teacher" in front
    assert "nats per token" in printed(outputs)
    assert printed(outputs).count("layer 2, correction 2: moved by ") == 1
    logged = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
    assert "raylet" not in logged
    assert "experiment_analysis" not in logged
    lines = printed(outputs) + "".join(data.get("text/plain", "") for data in shown)
    for task in ("pretrain", "influence (cosine)", "sweep", "report", "export", "evaluate"):
        assert f"{task}: " in lines, "progress"


@pytest.mark.long
def test_the_one_of_a_retrofit_runs(outputs_of):
    outputs = outputs_of("retrofit.ipynb")
    shown = [output.data for output in outputs if "data" in output]
    [front] = [data["text/html"] for data in shown if "<svg" in data.get("text/html", "")]
    for column in ("source_continued", "retention"):
        assert column in front
    assert any("Plan: iiet" in data.get("text/plain", "") for data in shown)
    assert ": 2,2, " in printed(outputs)
    assert "IIETForCausalLM (1, 4, " in printed(outputs)
