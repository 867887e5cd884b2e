"""An elastic sweep from its settings: one training, every schedule measured, students beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from orchestrator import plan_sweep, sweep
from orchestrator.models.folder import load_config, served_schedules
from orchestrator.pipelines.models import pick
from orchestrator.pipelines.sweeps import SweepResult
from orchestrator.reporting.elastic_section import ELASTIC_TITLE
from orchestrator.settings import Settings, read_settings
from orchestrator.workspace.layout import Workspace, open_workspace

pytestmark = pytest.mark.long

TREE = {
    "data": {"source": "depth", "depth": {"tasks": ["phop_2"], "length": 16}},
    "model": {"num_layers": 2, "dim": 64, "num_heads": 4, "corrections": 1, "context_length": 16},
    "training": {"num_steps": 4, "num_tokens_per_step": 256, "validate_every_steps": 2},
    "distillation": {"training": {"num_steps": 4, "num_tokens_per_step": 256}},
    "influence": {"num_tokens": 512},
    "evaluation": {"num_items": 50},
    "sweep": {"elastic": True},
}


def settings_of(folder: Path, *more: str) -> Settings:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(TREE))
    return read_settings(file, more)


def times_of_trainings(workspace: Workspace) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in workspace.trials.glob("*/done.json")}


def test_weights_are_trained_once_and_students_only_to_compare(
    tmp_path: Path, ray_session: None
) -> None:
    workspace, settings = open_workspace(tmp_path / "workspace"), settings_of(tmp_path)
    plan = plan_sweep(settings, workspace=workspace)
    assert "at most 1 elastic training;" in " ".join(plan.sentences)
    assert plan.price.num_trainings == 4, "the teacher, two baselines and the elastic training"

    done = sweep(settings, workspace=workspace)
    elastic = [trial for trial in done.trials if trial.is_elastic]
    assert str(elastic[0].model.corrections) == "1,1"
    assert len({trial.checkpoint for trial in elastic}) == 1
    assert len(trained := times_of_trainings(workspace)) == 1
    folder = Path(str(elastic[0].checkpoint))
    assert load_config(folder).corrections.corrections == (1, 1)
    assert set(served_schedules(folder)) == {trial.model.corrections for trial in elastic}
    assert done.report.elastic is None
    picked = pick(workspace=workspace)
    assert picked.folder
    exported = json.loads((picked.folder / "config.json").read_text("utf-8"))
    assert tuple(exported["corrections"]) == picked.point.schedule
    assert "learned" in (picked.folder / "README.md").read_text("utf-8")

    compared = settings_of(tmp_path, "sweep.compare=true")
    note = next(n for n in plan_sweep(compared, workspace=workspace).notes if "elastic" in n)
    assert note.startswith("one elastic training of 4 steps: ")
    both: SweepResult = sweep(compared, workspace=workspace)
    assert len(both.trials) == len(done.trials) + len(elastic)
    after = times_of_trainings(workspace)
    assert len(after) == 1 + len(elastic)
    assert after.items() >= trained.items(), "elastic weights are not trained again"
    section = both.report.elastic
    assert section
    rows = section.data["elastic"]["schedules"]
    assert [row["difference"] is not None for row in rows] == [True] * len(elastic)
    assert ELASTIC_TITLE in (both.report.folder / "front.md").read_text("utf-8")
    assert {state.name for state in plan_sweep(compared, workspace=workspace).states} == {
        "finished"
    }
    # A plain sweep finds the students finished.
    plain = plan_sweep(settings_of(tmp_path, "sweep.elastic=false"), workspace=workspace)
    assert {state.name for state in plain.states} == {"finished"}
