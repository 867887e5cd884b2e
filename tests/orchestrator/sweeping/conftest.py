"""A trained teacher, whose sweeps several files plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from iiet.config import ModelConfig
from orchestrator.records.training import TrainingJob
from orchestrator.settings import resolve_settings
from orchestrator.training.trainer import run_job


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
