"""Stands for Ray in sweeps: each trial ends here, as a function says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from orchestrator.evaluation import decode_timing
from orchestrator.records.trial import Trial
from orchestrator.sweeping import run
from orchestrator.sweeping.states import RunningSweep
from orchestrator.sweeping.trial import run_trial


def end_trials(monkeypatch: pytest.MonkeyPatch, end: Callable[[Trial], Trial | str]) -> None:
    """Make sweeps end each trial with what a function returns: its result, or why it failed.

    Times per token are measured with few tokens.
    """

    def run_trials(
        _: Any, trials: RunningSweep, *__: Any, watch: Callable[[], None], **___: Any
    ) -> None:
        while not trials.is_over:
            trial = trials.take()
            assert trial is not None, "no trial of these waits for another process"
            trials.on_start(trial.key)
            watch()
            result = end(trial)
            if isinstance(result, Trial):
                trials.on_end(trial.key, result, "")
            else:
                trials.on_end(trial.key, None, result)

    monkeypatch.setattr(run, "ray_cluster", lambda *_, **__: nullcontext())
    monkeypatch.setattr("orchestrator.cluster.tune.run_trials", run_trials)
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
