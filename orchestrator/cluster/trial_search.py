"""Ray Tune's OptunaSearch over trials that are planned as they are suggested, each once.

OptunaSearch knows points of a space; a `TrialSource` says which trial a point is. A point that is
known already is closed at once, so that it is not trained again, and the sampler is asked again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from orchestrator.records.trial import Trial

# isort: split
# After our own modules, because `orchestrator.cluster.start` sets the environment that Ray reads.
import ray.tune.search

search: Any = ray.tune.search
MAX_DUPLICATES = 20
"""After this many known points in a row, an unknown one is tried instead of the sampler's."""


class TrialSource(Protocol):
    """A stored Optuna study, and the trials of its points."""

    @property
    def study(self) -> Mapping[str, Any]:
        """Arguments of OptunaSearch: `space`, `mode`, `sampler`, `study_name`, `storage`."""

    @property
    def num_left(self) -> int:
        """Number of trials to suggest, as far as it is known now."""

    def accept(self, point: Mapping[str, int]) -> Trial | None:
        """Return the trial of a point; None if it is known already."""

    def values(self, trial: Trial) -> Sequence[float] | None:
        """Return what is optimized of a trial that has ended; None if it has no result."""

    def enqueue_unknown(self) -> None:
        """Make the study suggest an unknown point next."""


class TrialSearch(search.Searcher):  # type: ignore[misc]
    """Tune searcher of a trial source."""

    def __init__(self, source: TrialSource, parameters: Callable[[Trial], dict[str, Any]]) -> None:
        """Suggest from a source; `parameters` returns what a trial's function gets."""
        from ray.tune.search.optuna import OptunaSearch  # Imports optuna; trials do not need it.

        super().__init__()
        self.source, self._parameters = source, parameters
        self._metrics = [f"value {number}" for number in range(len(source.study["mode"]))]
        self._optuna: Any = OptunaSearch(metric=self._metrics, **source.study)
        self._running: dict[str, tuple[str, Trial]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return search.Searcher, ()  # Tune pickles it to restore it; the study restores itself.

    def suggest(self, trial_id: str) -> Any:
        """Return the next unknown trial, as Tune's configuration."""
        number = 0
        while self.source.num_left:
            number += 1
            if number % MAX_DUPLICATES == 0:
                self.source.enqueue_unknown()
            optuna_id = f"{trial_id}-{number}"
            trial = self.source.accept(self._optuna.suggest(optuna_id))
            if trial:
                self._running[trial_id] = optuna_id, trial
                parameters = json.dumps(self._parameters(trial))
                return {"trial": {"key": trial.key, "parameters": parameters}}
            self._close(optuna_id, None)
        return search.Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, *_: Any, **__: Any) -> None:
        """Store a trial's values in the study, or that it has none."""
        if trial_id in self._running:
            optuna_id, trial = self._running.pop(trial_id)
            self._close(optuna_id, self.source.values(trial))

    def _close(self, optuna_id: str, values: Sequence[float] | None) -> None:
        named = dict(zip(self._metrics, values, strict=True)) if values else None
        self._optuna.on_trial_complete(optuna_id, result=named, error=values is None)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study is stored."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: the study is stored."""
