"""A sweep on a depth task, from its file to the front, and what is done with its models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from orchestrator import plan_sweep, sweep
from orchestrator.pipelines.evaluating import evaluate
from orchestrator.pipelines.generating import Sampling, generate
from orchestrator.pipelines.models import pick
from orchestrator.settings import Settings, read_settings
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
    "sweep": {"num_schedules": 2},
}


def settings_of(folder: Path, *more: str) -> Settings:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(TREE))
    return read_settings(file, more)


def test_a_sweep_ends_with_accuracy_against_nfe(tmp_path: Path, ray_session: None) -> None:
    workspace, settings = open_workspace(tmp_path / "workspace"), settings_of(tmp_path)
    assert "at most 2 students" in " ".join(plan_sweep(settings, workspace=workspace).sentences)
    with pytest.raises(UserError, match="names phop_3, which the data cannot make"):
        sweep(settings_of(tmp_path, "evaluation.suite=phop_3"), workspace=workspace)
    assert not any(workspace.tokens.glob("*"))

    done = sweep(settings, workspace=workspace)
    for trial in done.trials:
        assert {"quality/accuracy", "quality/phop_2/acc"} <= set(trial.numbers)
        assert "quality/bits_per_byte" not in trial.numbers
    front = workspace.sweeps / done.name / "front.md"
    assert re.search(r"Chance of phop_2: 25\.0%, or \d+\.\d% by repeating", front.read_text())
    assert "Validation accuracy of full model" in front.with_suffix(".html").read_text()
    states = plan_sweep(settings, workspace=workspace).states
    assert {state.name for state in states} == {"finished"}

    exported = pick(workspace=workspace).folder
    assert exported
    assert 'tokenizer("<|0|><|1|>"' in (exported / "README.md").read_text()
    teacher = next(trial.checkpoint for trial in done.trials if trial.role == "teacher")
    (evaluation,) = evaluate(settings, workspace=workspace, models=[teacher]).evaluations.values()
    assert evaluation.quality()["accuracy"] == done.trials[0].numbers["quality/accuracy"]
    (text,) = generate(["<|0|><|1|>"], workspace=workspace, sampling=Sampling(max_new_tokens=3))
    assert re.fullmatch(r"(<\|\d\|>){1,3}", text)
    with pytest.raises(UserError, match="cannot read 'Once'"):
        generate(["Once"], workspace=workspace)
