"""Two models compared: stored evaluations, outputs of lm-eval, one of each, and mistakes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_tracking import untracked
from lm_eval_tasks import write_task

from orchestrator import cli
from orchestrator.evaluation.store import ITEMS
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.evaluating import (
    CompareResult,
    compare,
    plan_compare,
    plan_evaluate,
    run_compare,
    run_evaluate,
)
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.workspace.errors import UserError

DATE = "2026-01-01T00-00-00.000001"


@pytest.fixture
def checkpoint(workspace, save_tiny) -> Path:
    return save_tiny(workspace.runs / "tiny", initializer_std=0.5)


@pytest.fixture
def settings(tmp_path) -> Settings:
    words = ["bag", "hen", "cab", "face", "dad", "pig"]
    rows = [
        {"context": f"{a} {b}", "endings": ["bag", "fog", "dad"], "label": (i + j) % 3}
        for i, a in enumerate(words)
        for j, b in enumerate(words)
    ]
    accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    for name in ("red", "blue"):
        text = f"{{{{context}}}} {name}"
        changes: dict[str, Any] = {"doc_to_text": text, "metric_list": accuracy}
        folder = write_task(tmp_path / "tasks", name, rows, kind="choices", **changes)
    return Settings(evaluation=EvaluationSettings(suite="red,blue", include_path=str(folder)))


def compare_models(
    settings: Settings,
    models: tuple[Path | str, Path | str],
    context: Context,
    schedules: Sequence[str] = (),
) -> CompareResult:
    plan = plan_compare(settings, workspace=context.workspace, models=models, schedules=schedules)
    return run_compare(plan, context)


def lm_eval_output(folder: Path, tasks: dict[str, dict[str, float]]) -> Path:
    """Write results and samples as lm-eval does: task -> hash of a document to its `acc`."""
    folder.mkdir()
    results = {
        "results": {name: {"acc,none": 0.5} for name in tasks},
        "versions": dict.fromkeys(tasks, 2.0),
        "n-shot": dict.fromkeys(tasks, 0),
        "group_subtasks": {},
    }
    (folder / f"results_{DATE}.json").write_text(json.dumps(results))
    for name, values in tasks.items():
        samples = [
            {"doc_id": n, "doc_hash": key, "filter": "none", "metrics": ["acc"], "acc": value}
            for n, (key, value) in enumerate(values.items())
        ]
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"samples_{name}_{DATE}.jsonl").write_text(lines)
    return folder


def test_one_model_under_two_schedules_is_measured_once(checkpoint, settings, workspace, runs):
    def run() -> CompareResult:
        models = ("tiny", "tiny")
        return compare_models(settings, models, untracked(workspace), schedules=["2,1", "0"])

    found = run()
    assert run() == found
    assert runs == 2 * ["red", "blue"]
    assert found.models == ("r=2,1", "r=0")
    table = found.to_pandas()
    assert list(table["task"]) == ["red", "blue", "average"]
    assert list(table["num_items"]) == [36, 36, 72]
    assert (table["second"] - table["first"]).tolist() == pytest.approx(list(table["difference"]))
    assert (table["only_second"] - table["only_first"]).iloc[2] == pytest.approx(
        72 * table["difference"].iloc[2]
    )
    assert ((table["low"] <= table["difference"]) & (table["difference"] <= table["high"])).all()
    assert table["p_value"].between(0, 1).all()
    assert len(found.findings) == 3


def test_an_output_of_lm_eval_names_the_tasks_that_the_other_side_is_measured_on(
    checkpoint, settings, workspace, runs, tmp_path
):
    both = compare_models(settings, ("tiny", "tiny"), untracked(workspace))
    assert {row["difference"] for row in both.comparison.tasks} == {0}
    [path] = workspace.evaluations.glob("*/samples_blue_*")
    stored = json.loads((path.parent / ITEMS).read_text())
    # lm-eval's hashes are longer than the ones that are kept; one right answer becomes wrong.
    right = stored["values"]["acc"]
    changed = [*right]
    changed[right.index(1.0)] = 0.0
    hashes = [digits + "0" * 48 for digits in stored["items"]]
    output = lm_eval_output(tmp_path / "out", {"blue": dict(zip(hashes, changed, strict=True))})
    default = Settings(
        evaluation=settings.evaluation.model_copy(update={"suite": EvaluationSettings().suite})
    )
    found = compare_models(default, (output, "tiny"), untracked(workspace))
    assert runs == ["red", "blue"]
    [row] = found.comparison.tasks
    assert (row["task"], row["num_items"], row["only_second"]) == ("blue", 36, 1)
    assert found.models == (str(output), "tiny")


def test_written_files_compare_as_the_stored_evaluations_do(
    checkpoint, settings, workspace, runs, tmp_path
):
    context, both = untracked(workspace), ["2,1", "0"]
    stored = compare_models(settings, ("tiny", "tiny"), context, schedules=both)
    options: dict[str, Any] = {"workspace": workspace, "models": [checkpoint], "schedules": both}
    run_evaluate(plan_evaluate(settings, **options, log_samples=tmp_path / "own"), context)
    assert runs == 2 * ["red", "blue"], "the responses come from the store"
    folders = tmp_path / "own" / "r=2,1", tmp_path / "own" / "r=0"
    written = compare_models(settings, folders, context)
    assert written.rows() == stored.rows()
    mixed = compare_models(settings, (folders[0], checkpoint), context, schedules=["0"])
    assert mixed.rows() == stored.rows()
    (tmp_path / "file").touch()
    plan = plan_evaluate(settings, **options, log_samples=tmp_path / "file")
    with pytest.raises(UserError, match="--log-samples: cannot make the folder"):
        run_evaluate(plan, context)


def test_two_outputs_of_lm_eval_are_compared_at_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    keys = [f"{number:064x}" for number in range(40)]
    values = [{key: float(n < right) for n, key in enumerate(keys)} for right in (20, 32)]
    for name, of_model in zip(("one", "two"), values, strict=True):
        lm_eval_output(tmp_path / name, {"piqa": of_model})
    assert (
        cli.main(["evaluate", "--compare", "one", "two", "--workspace", str(tmp_path / "space")])
        == 0
    )
    printed = capsys.readouterr().out
    assert "accuracy of piqa: two is better (+30.00 points, 95 % interval" in printed
    written = compare(Settings(), workspace=tmp_path / "space", models=("one", "two")).to_json()
    assert written["models"] == ["one", "two"]
    [row] = written["rows"]
    assert (row["only_first"], row["only_second"]) == (0, 12)
    assert row["p_value"] == pytest.approx(2 * 0.5**12)
    assert row["low"] > 0
    same = compare(Settings(), workspace=tmp_path / "space", models=("one", "one"))
    assert same.models == ("one (A)", "one (B)")
    assert "no difference" in same.findings[0]


def test_mistakes_are_one_sentence_and_exit_code_2(
    checkpoint, workspace, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    lm_eval_output(tmp_path / "one", {"piqa": {"0" * 64: 1.0}})
    lm_eval_output(tmp_path / "two", {"sciq": {"0" * 64: 1.0}})
    (tmp_path / "empty").mkdir()
    for words, reason in [
        (["one", "two"], "nothing can be compared: only one has piqa; only two has sciq"),
        (["one", "two", "-r", "1"], "--schedule: one is an output of lm-eval"),
        (["one", "tiny", "-r", "1", "-r", "0"], "--schedule: one is an output of lm-eval"),
        (["one", "tiny", "-r", "1", "-r", "0", "-r", "2"], "got 3 schedules for 2 models"),
        (["one", "missing"], "there is no folder missing"),
        (["one", "."], ". has results of several models; name one of its folders: one, two"),
        (["one", "empty"], "empty holds no checkpoint"),
    ]:
        assert cli.main(["evaluate", "--compare", *words, "--workspace", str(workspace.root)]) == 2
        printed = " ".join(capsys.readouterr().err.split())
        assert reason in printed, printed
        assert "Traceback" not in printed
