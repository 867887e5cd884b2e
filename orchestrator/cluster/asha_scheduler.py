"""Ray Tune's asynchronous successive halving (ASHA; Li et al., MLSys 2020), one bracket per model.

Only learning rates of the same model compete. A worse trial is not killed: it gets a message, saves
its checkpoint and returns, so its workers and its lock are free. Ray's scheduler forgets all losses
when its process ends. So this one first reads the journals of all trials, and before each decision
those of trials that another process runs. What a journal holds was decided before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orchestrator.training.monitor import JournalReader
from orchestrator.workspace.journal import VALIDATION_METRIC

# isort: split
# After our own modules, because `orchestrator.cluster.start` sets the environment that Ray reads.
import ray.tune.schedulers

schedulers: Any = ray.tune.schedulers
STEP, LOSS = "step", "validation_loss"
"""What a trial reports to Tune."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A trial that can be stopped early."""

    model: str
    """Trials with the same name here compete."""
    folder: str
    """Folder of its journal."""
    num_steps: int
    """Steps of its whole training."""
    first_rung: int
    """Steps before the first comparison."""


class AshaByModel(schedulers.FIFOScheduler):  # type: ignore[misc]
    """Tune scheduler that lets each trial compete with trials of the same model."""

    def __init__(
        self,
        contestants: Mapping[str, Contestant],
        reduction_factor: int,
        stop: Callable[[str, int, float], None],
    ) -> None:
        """Start from the losses in the journals.

        Args:
            contestants: Key -> trial; trials that are not among them run to their end.
            reduction_factor: One of this many trials at a rung continues.
            stop: Called with the key of a trial to stop, and the step and loss of its validation.
        """
        super().__init__()
        self._contestants, self._stop = dict(contestants), stop
        self._journals = {k: JournalReader(Path(c.folder)) for k, c in contestants.items()}
        self._brackets: dict[str, Any] = {}
        self._tune_trials: dict[str, Any] = {}
        for key, trial in contestants.items():
            if trial.model not in self._brackets:
                self._brackets[trial.model] = schedulers.ASHAScheduler(
                    time_attr=STEP,
                    metric=LOSS,
                    mode="min",
                    max_t=trial.num_steps,
                    grace_period=trial.first_rung,
                    reduction_factor=reduction_factor,
                    stop_last_trials=False,
                )
            self._brackets[trial.model].on_trial_add(None, _named(key))
            self._read_journal(key)

    def on_trial_add(self, _controller: Any, trial: Any) -> None:
        """Note a trial of this process."""
        self._tune_trials[trial.config["trial"]["key"]] = trial

    def on_trial_result(self, _controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide about a trial after a validation; to Tune, it always continues."""
        key = trial.config["trial"]["key"]
        # A loss that is not finite ends its training by itself.
        if key in self._contestants and math.isfinite(result.get(LOSS, math.nan)):
            own = self._contestants[key]
            for rival, other in self._contestants.items():
                if other.model == own.model and not self._runs_here(rival):
                    self._read_journal(rival)
            decision = self._report(key, result[STEP], result[LOSS])
            if decision == schedulers.TrialScheduler.STOP and result[STEP] < own.num_steps:
                self._stop(key, result[STEP], result[LOSS])
        return str(schedulers.TrialScheduler.CONTINUE)

    def _runs_here(self, key: str) -> bool:
        # Then it reports each loss itself, and a loss that ASHA has read before is not decided on.
        return key in self._tune_trials and self._tune_trials[key].status == "RUNNING"

    def _read_journal(self, key: str) -> None:
        for step, loss in validation_losses(self._journals[key].read()):
            self._report(key, step, loss)

    def _report(self, key: str, step: int, loss: float) -> str:
        bracket = self._brackets[self._contestants[key].model]
        return str(bracket.on_trial_result(None, _named(key), {STEP: step, LOSS: loss}))


def validation_losses(records: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return the steps and validation losses in a journal's records, the finite ones."""
    return [
        (record["step"], loss)
        for record in records
        if record["kind"] == "metrics"
        and math.isfinite(loss := record["values"].get(VALIDATION_METRIC, math.nan))
    ]


def _named(key: str) -> Any:
    # All that ASHA reads of a trial is its id, and another process's trials have none in Tune.
    return SimpleNamespace(trial_id=key)
