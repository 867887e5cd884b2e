"""A sweep whose teacher has a source measures what its models have lost, by the bounds of the
settings or by the default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_runs import end_trials, trained
from fake_tracking import untracked
from refusals import refused

from orchestrator.pipelines.models import plan_pick
from orchestrator.pipelines.training import plan_pretrain, run_pretrain
from orchestrator.settings import Settings, resolve_settings
from orchestrator.settings.evaluation import DEFAULT_RETENTION, PYTHON_BITS_TASK
from orchestrator.settings.schema import broken_rules
from orchestrator.sweeping.stages import plan_sweep
from orchestrator.sweeping.sweep import run_sweep
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace

SIZES = {"num_layers": 2, "dim": 16, "num_heads": 2, "ffn_dim": 32, "context_length": 32}
TEXT = {"source": "python", "vocab_size": 400}
HOPS = {"source": "depth", "depth": {"tasks": ["phop_2"], "length": 16}}


def settings_of(data: dict[str, Any], *assignments: str) -> Settings:
    tree = {
        "data": data,
        "training": {
            "num_steps": 2, "num_tokens_per_step": 256, "num_validation_tokens": 256,
            "warmup_steps": 1,
        },
        "influence": {"num_tokens": 256},
        "evaluation": {"num_items": 20},
        "distillation": {"control": "pruned"},
        "sweep": {"num_schedules": 2, "source_controls": ["source"]},
    }  # fmt: skip
    return resolve_settings(tree, assignments)


def trained_pair(workspace: Workspace, data: dict[str, Any], *, num_steps: int = 2) -> None:
    """Train `plain`, and from it `retrofit`, whose rate is so high that it forgets."""
    context = untracked(workspace)
    sizes = [f"model.{name}={value}" for name, value in SIZES.items() if "context" not in name]
    if data is TEXT:
        sizes.append(f"model.context_length={SIZES['context_length']}")
    plain = settings_of(data, "model.method=vanilla", f"training.num_steps={num_steps}", *sizes)
    run_pretrain(plan_pretrain(plain, workspace=workspace, name="plain", local=True), context)
    retrofit = settings_of(data, "model.corrections=1", "training.learning_rate=0.3")
    plan = plan_pretrain(retrofit, workspace=workspace, source="plain", name="retrofit", local=True)
    run_pretrain(plan, context)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    """A workspace with a plain model of text, `plain`, and an IIET of it, `retrofit`."""
    space = open_workspace(tmp_path_factory.mktemp("text"))
    trained_pair(space, TEXT, num_steps=20)  # It knows something that can be forgotten.
    return space


def planned(workspace: Workspace, *assignments: str, teacher: str = "retrofit") -> Any:
    return plan_sweep(settings_of(TEXT, *assignments), workspace=workspace, teacher=teacher)


@pytest.mark.slow
def test_the_default_is_there_where_the_teacher_has_a_source_that_reads_text(workspace, tmp_path):
    evaluation = planned(workspace).settings.evaluation
    assert evaluation.retention == DEFAULT_RETENTION
    assert planned(workspace, "evaluation.retention={}").settings.evaluation.retention == {}
    assert planned(workspace, "sweep.source_controls=[]").settings.evaluation.retention == {}
    for control in ("[]", "[source_continued]"):
        with pytest.raises(UserError, match=r"sweep\.source_controls"):
            planned(
                workspace, f"sweep.source_controls={control}",
                "evaluation.retention={lastword: 1.0}",
            )  # fmt: skip
    symbols = open_workspace(tmp_path)
    trained_pair(symbols, HOPS)
    assert planned(symbols).settings.evaluation.retention == {}
    assert planned(symbols, "evaluation.retention={phop_2: 1.0}")
    for name in ("bits_per_byte", "short_answers"):
        with refused(UserError, "evaluation.retention", name):
            planned(symbols, f"evaluation.retention={{{name}: 1.0}}")


def test_without_a_source_there_is_nothing_to_lose(tmp_path):
    space = open_workspace(tmp_path)
    context = untracked(space)
    sizes = [f"model.{name}={value}" for name, value in SIZES.items()]
    alone = settings_of(TEXT, "model.corrections=1", *sizes)
    run_pretrain(plan_pretrain(alone, workspace=space, name="retrofit", local=True), context)
    assert planned(space).settings.evaluation.retention == {}
    with pytest.raises(UserError, match=r"evaluation\.retention"):
        planned(space, "evaluation.retention={lastword: 1.0}")
    of_iterations = settings_of(
        TEXT, "evaluation.retention={lastword: 1.0}", "sweep.kind=iterations"
    )
    assert any(
        "evaluation.retention" in rule for rule in broken_rules(of_iterations, of_sweep=True)
    )


@pytest.mark.slow
def test_a_sweep_reports_what_was_lost_and_another_bound_measures_nothing_again(
    workspace, monkeypatch
):
    end_trials(monkeypatch, trained)
    context = untracked(workspace)
    result = run_sweep(planned(workspace), context)
    assert not result.failures
    source = next(trial for trial in result.trials if trial.role == "source")
    assert f"quality/{PYTHON_BITS_TASK}/bits_per_byte" in source.numbers
    # The average is of the data's own text alone.
    bits = source.numbers["quality/bits_per_byte"]
    assert bits == source.numbers["quality/bits_per_byte/bits_per_byte"]
    front = json.loads((Path(result.folder) / "front.json").read_text())
    lost = {row["role"]: front["retention"].get(row["key"]) for row in front["results"]}
    assert lost["source"] is None
    [of_teacher] = lost["teacher"]
    assert of_teacher["lost"] > 0.02
    assert not of_teacher["kept"]
    assert "loses" in (Path(result.folder) / "front.html").read_text()
    with pytest.raises(UserError, match="--allow-loss"):
        plan_pick(result.name, workspace=workspace, best=True)

    end_trials(monkeypatch, lambda trial: pytest.fail(f"{trial.label} is measured again"))
    second_result = run_sweep(
        planned(workspace, "evaluation.retention={bits_per_byte: 100}"), context
    )
    assert second_result.name == result.name
    assert plan_pick(result.name, workspace=workspace, best=True)
