"""Ray Tune's asynchronous successive halving (ASHA; Li et al., MLSys 2020), one bracket per model.

Only learning rates of the same model compete. A worse trial is not killed: it gets a message, saves
its checkpoint and returns, so its workers and its lock are free. Ray's scheduler forgets all losses
when its process ends. So this one first reads the journals of all trials, and before each decision
those of trials that another process runs. What a journal holds was decided before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orchestrator.records.trial import AshaTrial
from orchestrator.training.watching import JournalReader
from orchestrator.workspace.journal import validation_losses

# isort: split
# After our own modules, because `orchestrator.cluster.start` sets the environment that Ray reads.
import ray.tune.schedulers

schedulers: Any = ray.tune.schedulers
STEP, LOSS = "step", "validation_loss"
"""What a trial reports to Tune."""


class AshaByModel(schedulers.FIFOScheduler):  # type: ignore[misc]
    """Tune scheduler that lets each trial compete with trials of the same model."""

    def __init__(
        self, asha: Mapping[str, AshaTrial], stop: Callable[[str, int, float], None]
    ) -> None:
        """Start from the losses in the journals.

        Args:
            asha: By key, the trials that can be stopped early; others run to their end.
            stop: Called with the key of a trial to stop, and the step and loss of its validation.
        """
        super().__init__()
        self._asha, self._stop = dict(asha), stop
        self._journals = {key: JournalReader(Path(own.folder)) for key, own in asha.items()}
        self._brackets: dict[str, Any] = {}
        self._tune_trials: dict[str, Any] = {}
        for key, own in asha.items():
            if own.model not in self._brackets:
                first_rung = max(1, math.ceil(own.rule.first_rung * own.num_steps))
                self._brackets[own.model] = schedulers.ASHAScheduler(
                    time_attr=STEP,
                    metric=LOSS,
                    mode="min",
                    max_t=own.num_steps,
                    grace_period=first_rung,
                    reduction_factor=own.rule.reduction_factor,
                    stop_last_trials=False,
                )
            self._brackets[own.model].on_trial_add(None, _named(key))
            self._read_journal(key)

    def on_trial_add(self, _controller: Any, trial: Any) -> None:
        """Note a trial of this process."""
        self._tune_trials[trial.config["trial"]["key"]] = trial

    def on_trial_result(self, _controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide about a trial after a validation; to Tune, it always continues."""
        key = trial.config["trial"]["key"]
        # A loss that is not finite ends its training by itself.
        if key in self._asha and math.isfinite(result.get(LOSS, math.nan)):
            own = self._asha[key]
            for rival, other in self._asha.items():
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
        bracket = self._brackets[self._asha[key].model]
        return str(bracket.on_trial_result(None, _named(key), {STEP: step, LOSS: loss}))


def _named(key: str) -> Any:
    # All that ASHA reads of a trial is its id, and another process's trials have none in Tune.
    return SimpleNamespace(trial_id=key)
