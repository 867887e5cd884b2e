"""The mixture of docs/data.md works in every command, at a tiny size."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refused
from small_size import SMALL

from orchestrator.pipelines.evaluating import evaluate
from orchestrator.pipelines.influence import measure_influence
from orchestrator.pipelines.training import distill, plan_pretrain, prepare, pretrain
from orchestrator.settings import Settings, resolve_settings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import VALIDATION_METRIC, read_journal

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
SIZES = ["model.context_length=80", "training.num_tokens_per_step=1280", "training.num_steps=6"]
SIZES += ["training.num_validation_tokens=2400", "training.iterate_from_fraction=0.5"]
SIZES += ["distillation.training.num_tokens_per_step=320"]
SOURCES = ("python", "chain_4", "phop_6")


def documented(*more: str) -> Settings:
    (block,) = re.findall(r"`mixture.yaml`:\n\n```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return resolve_settings(yaml.safe_load(block), [*SMALL, *SIZES, *more])


def metrics_of(checkpoint: Path) -> dict[str, Any]:
    """Return the latest value of each metric of a run."""
    values: dict[str, Any] = {}
    for record in read_journal(checkpoint.parent)[0]:
        values |= record["values"] if record["kind"] == "metrics" else {}
    return values


def test_a_mixture_is_planned_trained_distilled_and_measured(tmp_path):
    workspace = tmp_path / "workspace"
    settings = documented()
    options: dict[str, Any] = {"workspace": workspace}
    (planned,) = plan_pretrain(settings, **options).jobs.values()
    with refused(UserError, "65", "64", "model.context_length"):
        plan_pretrain(documented("model.context_length=64"), **options)
    tokens = prepare(settings, **options)
    assert prepare(settings, **options) == tokens
    (planned_again,) = plan_pretrain(settings, **options).jobs.values()
    assert planned_again.model == planned.model
    teacher = pretrain(settings, **options, local=True).checkpoint

    teacher_metrics = metrics_of(teacher)
    losses = {name: teacher_metrics[f"{VALIDATION_METRIC}_{name}"] for name in SOURCES}
    assert min(losses.values()) < teacher_metrics[VALIDATION_METRIC] < max(losses.values())
    assert {f"train/loss_{name}" for name in SOURCES} <= set(teacher_metrics)
    assert {n for n in teacher_metrics if "accuracy_" in n} == {
        f"validation/accuracy_{name}" for name in SOURCES[1:]
    }
    assert measure_influence(settings, **options, model=teacher).table.num_tokens > 0
    student = distill(settings, **options, schedule="0", teacher=teacher, local=True).checkpoint
    assert math.isfinite(metrics_of(student)["train/kl"])

    moved = workspace.rename(tmp_path / "moved")
    (evaluation,) = evaluate(settings, workspace=moved).evaluations.values()
    tasks = {"lastword", "bits_per_byte", *SOURCES[1:]}
    assert set(evaluation.results) == tasks
