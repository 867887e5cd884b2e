"""Sweeps whose trials end in this process, as a function says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pretended_ray import end_trials_here, idle_ray

from orchestrator.evaluation import decode_timing
from orchestrator.records.trial import Trial
from orchestrator.sweeping.trial import run_trial


def end_trials(monkeypatch: pytest.MonkeyPatch, end: Callable[[Trial], Trial | str]) -> None:
    """Make sweeps end each trial with what a function returns: its result, or why it failed.

    Times per token are measured with few tokens.
    """

    idle_ray(monkeypatch)
    end_trials_here(monkeypatch, end)
    monkeypatch.setattr(decode_timing, "SWEEP_PROMPT_TOKENS", 4)
    monkeypatch.setattr(decode_timing, "SWEEP_NEW_TOKENS", 2)


def finished(trial: Trial, accuracy: float = 0.5, checkpoint: Path | str | None = None) -> Trial:
    """Return a trial with a result, which is stored."""
    measured = {
        "numbers": {"quality/accuracy": accuracy, "train/flops": 1},
        "checkpoint": str(checkpoint or trial.checkpoint or "") or None,
    }
    result = trial.model_copy(update=measured)
    result.write(trial.result_path)
    return result


def trained(trial: Trial) -> Trial | str:
    """Run a trial in this process."""
    return run_trial(trial) or "stopped"
