"""A trained teacher, whose sweeps several files plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from iiet.config import ModelConfig
from iiet.pruning import InfluenceTable
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import TrialSuite
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.students import Students
from orchestrator.training.trainer import run_job
from orchestrator.workspace.layout import Workspace, open_workspace


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokens: Path) -> Path:
    model = ModelConfig.from_dict(
        {
            "vocab_size": 300, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2,
            "ffn_dim": 32, "context_length": 16, "schedule": [2, 1],
        }
    ).to_dict()  # fmt: skip
    recipe = resolve_settings({}, ["training.num_steps=2", "training.num_tokens_per_step=64"])
    outcome = run_job(
        TrainingJob(
            run_folder=str(tmp_path_factory.mktemp("runs") / "teacher"),
            tokens_folder=str(tiny_tokens),
            model=model,
            recipe=recipe.training,
        )
    )
    return Path(str(outcome.checkpoint))


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path)


@pytest.fixture
def table() -> InfluenceTable:
    """The teacher's influence: its family is 2,1 then 1,1 then 1,0 then 0,0."""
    return InfluenceTable(
        metric="cosine",
        value_rows=((0.5, 0.1), (0.3,)),
        error_rows=((0.0, 0.0), (0.0,)),
        num_tokens=64,
        layer_values=(0.2, 0.7),
    )


@pytest.fixture
def students(space: Workspace, teacher: Path, tiny_tokens: Path) -> Callable[..., Students]:
    """A function that returns the teacher's students under settings, as `name=value` texts."""

    def make(*assignments: str, **suite: str) -> Students:
        measured = TrialSuite(**{"suite": "x", "tokens_folder": str(tiny_tokens), **suite})
        return Students(resolve_settings({}, assignments), space, teacher, measured)

    return make
