"""An elastic sweep on a depth task, from its settings to the front, and what is done with its
models: one training, every schedule measured, students beside it to compare."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from orchestrator import plan_sweep, sweep
from orchestrator.models.folder import load_config, served_schedules
from orchestrator.pipelines.evaluating import evaluate
from orchestrator.pipelines.generating import generate
from orchestrator.pipelines.models import pick
from orchestrator.reporting.elastic_section import ELASTIC_TITLE
from orchestrator.settings import Settings, resolve_settings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import open_workspace

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


def settings_of(*more: str) -> Settings:
    return resolve_settings(TREE, more)


def test_weights_are_trained_once_and_students_only_to_compare(
    tmp_path: Path, ray_session: None
) -> None:
    workspace, settings = open_workspace(tmp_path / "workspace"), settings_of()
    plan = plan_sweep(settings, workspace=workspace)
    assert "at most 1 elastic training;" in " ".join(plan.sentences)
    assert plan.price.num_trainings == 4, "the teacher, two baselines and the elastic training"
    with pytest.raises(UserError, match="names phop_3, which the data cannot make"):
        sweep(settings_of("evaluation.suite=phop_3"), workspace=workspace)
    assert not any(workspace.tokens.glob("*"))

    def trained() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in workspace.trials.glob("*/done.json")}

    done = sweep(settings, workspace=workspace)
    for trial in done.trials:
        assert {"quality/accuracy", "quality/phop_2/acc"} <= set(trial.numbers)
        assert "quality/bits_per_byte" not in trial.numbers
    elastic = [trial for trial in done.trials if trial.is_elastic]
    assert str(elastic[0].model.corrections) == "1,1"
    [folder] = {Path(str(trial.checkpoint)) for trial in elastic}
    assert len(once := trained()) == 1
    assert load_config(folder).corrections.corrections == (1, 1)
    assert set(served_schedules(folder)) == {trial.model.corrections for trial in elastic}
    front = workspace.sweeps / done.name / "front.md"
    assert re.search(r"Chance of phop_2: 25\.0%, or \d+\.\d% by repeating", front.read_text())
    assert "Validation accuracy of full model" in front.with_suffix(".html").read_text()

    picked = pick(workspace=workspace)
    assert picked.folder
    exported = json.loads((picked.folder / "config.json").read_text("utf-8"))
    assert tuple(exported["corrections"]) == picked.point.schedule
    readme = (picked.folder / "README.md").read_text("utf-8")
    assert "learned" in readme
    assert 'tokenizer("<|0|><|1|>"' in readme
    teacher = next(trial for trial in done.trials if trial.role == "teacher")
    found = evaluate(settings, workspace=workspace, models=[teacher.checkpoint]).evaluations
    [evaluation] = found.values()
    assert evaluation.quality()["accuracy"] == teacher.numbers["quality/accuracy"]
    [text] = generate(["<|0|><|1|>"], workspace=workspace, max_new_tokens=3)
    assert re.fullmatch(r"(<\|\d\|>){1,3}", text)
    with pytest.raises(UserError, match="cannot read 'Once'"):
        generate(["Once"], workspace=workspace)

    compared = settings_of("sweep.compare=true")
    both = sweep(compared, workspace=workspace)
    assert len(both.trials) == len(done.trials) + len(elastic)
    assert len(trained()) == 1 + len(elastic)
    assert trained().items() >= once.items(), "elastic weights are not trained again"
    assert both.elastic
    rows = both.elastic.data["elastic"]["schedules"]
    assert [row["difference"] is not None for row in rows] == [True] * len(elastic)
    assert ELASTIC_TITLE in (both.folder / "front.md").read_text("utf-8")
    # A plain sweep finds the students finished.
    for again in (compared, settings_of("sweep.elastic=false")):
        states = plan_sweep(again, workspace=workspace).states
        assert {state.name for state in states} == {"finished"}
