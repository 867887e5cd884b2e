"""Trials that were measured, without a plan or weights."""

from __future__ import annotations

from typing import Any

from iiet.config import ModelConfig
from iiet.methods import METHODS
from iiet.schedule import IterationSchedule
from orchestrator.records.trial import Trial, TrialSuite


def sample_trial(
    *, key: str = "k", method: str = "iiet", schedule: tuple[int, ...] | None = None, **values: Any
) -> Trial:
    """Return a trial of a tiny model; other fields of `Trial` are given by name."""
    corrections = schedule or (0,) * 6
    model = ModelConfig(
        vocab_size=300,
        dim=16,
        num_layers=len(corrections),
        num_heads=2,
        num_kv_heads=2,
        ffn_dim=32,
        context_length=16,
        method=method,
        schedule=IterationSchedule(corrections) if METHODS[method].has_corrections else None,
    )
    given = {"role": "trial", "folder": "", "suite": TrialSuite(tokens_folder=""), **values}
    return Trial(key=key, model=model, **given)
