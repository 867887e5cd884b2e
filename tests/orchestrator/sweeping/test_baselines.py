"""Baselines beside a teacher: found by what makes a result, left out only with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_texts import tokens_of

from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import TrainingSettings
from orchestrator.sweeping.baselines import find_baselines
from orchestrator.training.trainer import run_job
from orchestrator.workspace.layout import Workspace, find_checkpoints, open_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "ws")


def damage_newest(run: Path) -> None:
    weights = find_checkpoints(run)[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


@pytest.fixture
def teacher(workspace: Workspace, tiny_tokens: Path, tiny_model: dict[str, Any]) -> Path:
    return pretrained(workspace, "teacher", tiny_tokens, tiny_model)


def pretrained(
    workspace: Workspace, name: str, tokens: Path, model: dict[str, Any], **recipe: Any
) -> Path:
    """Train a run of two steps and return its checkpoint."""
    usual = {"num_steps": 2, "num_tokens_per_step": 64, "num_validation_tokens": 64}
    job = TrainingJob(
        run_folder=str(workspace.runs / name),
        tokens_folder=str(tokens),
        model=model,
        recipe=TrainingSettings(**{**usual, **recipe}),
    )
    return Path(str(run_job(job).checkpoint))


VANILLA = {"method": "vanilla", "schedule": None}
OTHER_END = TrainingOutcome(checkpoint=None, step=7, finished=True)


def test_a_baseline_may_be_saved_and_watched_in_another_way(
    workspace: Workspace, teacher: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    ways = {
        "checkpoint_every_steps": 1, "num_checkpoints_kept": 1, "keep_best": True,
        "validate_every_steps": 1, "num_sequences_per_pass": 1, "activation_checkpointing": True,
        "skip_bad_steps": 3, "checkpoint_every_minutes": 9.0, "learning_rate": 1e-3,
    }  # fmt: skip
    vanilla = pretrained(workspace, "v", tiny_tokens, {**tiny_model, **VANILLA}, **ways)
    none = pretrained(workspace, "n", tiny_tokens, {**tiny_model, "schedule": [0, 0]})
    baselines = find_baselines(workspace, teacher)
    assert baselines.found == {"vanilla": vanilla, "r = 0": none}
    assert not baselines.left_out


def test_a_baseline_needs_none_of_the_options_of_its_teachers_method(
    workspace: Workspace, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    damped = {**tiny_model, "method_options": {"damping": 0.5}}
    teacher = pretrained(workspace, "damped", tiny_tokens, damped)
    vanilla = pretrained(workspace, "v", tiny_tokens, {**tiny_model, **VANILLA})
    baselines = find_baselines(workspace, teacher)
    assert baselines.found == {"vanilla": vanilla}
    assert not baselines.left_out


def test_a_baseline_of_another_recipe_is_left_out_with_the_difference(
    workspace: Workspace, teacher: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    pretrained(workspace, "long", tiny_tokens, {**tiny_model, **VANILLA}, num_steps=3)
    baselines = find_baselines(workspace, teacher)
    assert not baselines.found
    assert baselines.left_out == {
        "long": "vanilla is left out: training.num_steps is 3 and the teacher's 2"
    }
    pretrained(workspace, "alike", tiny_tokens, {**tiny_model, **VANILLA})
    assert not find_baselines(workspace, teacher).left_out, "another one stands there"


def test_a_baseline_of_other_tokens_is_left_out(
    tmp_path: Path, workspace: Workspace, teacher: Path, tiny_model: dict[str, Any]
) -> None:
    words = [f"word {number} " * 40 for number in range(40)]
    tokens = tokens_of(words, tmp_path / "other tokens", vocab_size=300)
    pretrained(workspace, "v", tokens, {**tiny_model, **VANILLA})
    baselines = find_baselines(workspace, teacher)
    assert not baselines.found
    assert "vanilla is left out: tokens is " in baselines.left_out["v"]


def test_baselines_of_other_depths_are_found_if_they_are_asked_for(
    workspace: Workspace, teacher: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    vanilla = {**tiny_model, **VANILLA}
    own = pretrained(workspace, "own", tiny_tokens, vanilla)
    deep = pretrained(workspace, "deep", tiny_tokens, {**vanilla, "num_layers": 3})
    usual = find_baselines(workspace, teacher)
    assert usual.found == {"vanilla": own}
    assert not usual.left_out, "another vanilla model stands there"
    other = find_baselines(workspace, teacher, {"vanilla": 3})
    assert other.found == {"vanilla, 3 layers": deep}
    assert other.left_out == {
        "own": "vanilla is left out: it has 2 layers, which sweep.num_layers leaves out"
    }
    pretrained(workspace, "long", tiny_tokens, {**vanilla, "num_layers": 1}, num_steps=3)
    several = find_baselines(workspace, teacher, {"vanilla": (1, 2, 3)})
    assert several.found == {"vanilla": own, "vanilla, 3 layers": deep}
    assert several.left_out == {
        "long": "vanilla, 1 layer is left out: training.num_steps is 3 and the teacher's 2"
    }


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda run: (run / "done.json").write_text("{"), "done.json is damaged"),
        (lambda run: (run / "done.json").write_text("[]"), "done.json is damaged"),
        (lambda run: (run / "done.json").write_text('{"step": 7}'), "done.json is damaged"),
        (lambda run: OTHER_END.write(run / "done.json"), "no checkpoint folder .*07"),
        (lambda run: (run / "done.json").unlink(), "its training is not finished"),
        (damage_newest, "step_00000002 is damaged"),
    ],
)
def test_a_baseline_that_cannot_be_used_is_left_out_with_the_reason(
    workspace: Workspace,
    teacher: Path,
    tiny_tokens: Path,
    tiny_model: dict[str, Any],
    harm: Callable[[Path], None],
    words: str,
) -> None:
    recipe = {"checkpoint_every_steps": 1}
    pretrained(workspace, "v", tiny_tokens, {**tiny_model, **VANILLA}, **recipe)
    harm(workspace.runs / "v")
    baselines = find_baselines(workspace, teacher)
    assert not baselines.found
    assert list(baselines.left_out) == ["v"]
    assert re.search(f"^vanilla is left out: .*{words}", baselines.left_out["v"])


def test_a_run_whose_only_checkpoint_says_nothing_is_left_out_with_the_reason(
    workspace: Workspace, teacher: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    pretrained(workspace, "v", tiny_tokens, {**tiny_model, **VANILLA})
    for config in (workspace.runs / "v").glob("step_*/config.json"):
        config.unlink()
        config.symlink_to(config)
    baselines = find_baselines(workspace, teacher)
    assert not baselines.found
    assert "the run v is left out: " in baselines.left_out["v"]
    assert "config.json" in baselines.left_out["v"]
