"""Of one model's learning rates the best goes on at every rung, also after a restart."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orchestrator.cluster.asha_scheduler import LOSS, STEP, AshaByModel

from orchestrator.records.trial import AshaRule, AshaTrial
from orchestrator.workspace.journal import VALIDATION_METRIC, Journal

NUM_STEPS = 8
CURVES = st.lists(st.lists(st.floats(1.0, 9.0), min_size=8, max_size=8), min_size=1, max_size=7)


class Race:
    """Trains made-up curves, and stops those that ASHA stops. A folder holds their journals."""

    def __init__(
        self, folder: Path, curves: Mapping[str, Sequence[float]], *,
        reduction_factor: int = 2, model_of: Callable[[str], str] = lambda key: "model",
    ) -> None:  # fmt: skip
        self.folder, self.curves, self.reduction_factor = folder, curves, reduction_factor
        self.model_of = model_of
        self.stopped: dict[str, int] = {}
        self.reached = dict.fromkeys(curves, 0)
        self.restart()

    def restart(self) -> None:
        """Begin again with a scheduler that knows nothing but the journals."""
        rule = AshaRule(first_rung=0.25, reduction_factor=self.reduction_factor)
        folders = {key: str(self.folder / key) for key in self.curves}
        asha = {
            key: AshaTrial(
                rule=rule, folder=folders[key], num_steps=NUM_STEPS,
                competitors={
                    other: folder for other, folder in folders.items()
                    if other != key and self.model_of(other) == self.model_of(key)
                },
            )
            for key in self.curves
        }  # fmt: skip
        self.asha = AshaByModel(asha, lambda key, step, loss: self.stop(key, step))
        self.trials = {
            key: SimpleNamespace(config={"trial": {"key": key}}, status="RUNNING")
            for key in self.curves
        }
        for trial in self.trials.values():
            self.asha.on_trial_add(None, trial)

    def stop(self, key: str, step: int) -> None:
        assert key not in self.stopped, "a verdict is final"
        self.stopped[key] = step

    def validate(self, key: str, step: int, *, elsewhere: bool = False) -> None:
        """Write a validation to the journal; unless `elsewhere`, report it to Tune."""
        self.reached[key] = step
        loss = self.curves[key][step - 1]
        journal = Journal(self.folder / key)
        journal.metrics(step, {VALIDATION_METRIC: loss})
        journal.close()
        if not elsewhere:
            result = {STEP: step, LOSS: loss}
            assert self.asha.on_trial_result(None, self.trials[key], result) == "CONTINUE"

    def run(self, seed: int, gap: int = 1, until: int = NUM_STEPS) -> None:
        """Train in a random order, and validate every `gap` steps."""
        order = random.Random(seed)
        while waiting := [
            key for key, step in self.reached.items()
            if key not in self.stopped and step + gap <= until
        ]:  # fmt: skip
            key = order.choice(waiting)
            self.validate(key, self.reached[key] + gap)


@settings(max_examples=25)
@given(CURVES, st.integers(2, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_best_at_a_rung_goes_on_whoever_came_first(
    tmp_path_factory: pytest.TempPathFactory,
    losses: list[list[float]], reduction_factor: int, gap: int, seed: int,
) -> None:  # fmt: skip
    curves = {f"rate {n}": curve for n, curve in enumerate(losses)}
    race = Race(tmp_path_factory.mktemp("race"), curves, reduction_factor=reduction_factor)
    race.run(seed, gap)
    for key, step in race.stopped.items():
        rungs = [2 * reduction_factor**n for n in range(3)]
        assert [rung for rung in rungs if step - gap < rung <= step]
        assert step < NUM_STEPS
        assert curves[key][step - 1] > min(curve[step - 1] for curve in curves.values())
    assert len(race.stopped) < len(curves), "one is trained to its end"


@settings(max_examples=25)
@given(CURVES, st.integers(1, NUM_STEPS - 1), st.integers(0, 2**32 - 1))
def test_a_restart_in_the_middle_gives_the_same_verdicts(
    tmp_path_factory: pytest.TempPathFactory, losses: list[list[float]], middle: int, seed: int
) -> None:
    curves = {f"rate {n}": curve for n, curve in enumerate(losses)}
    whole, restarted = (Race(tmp_path_factory.mktemp("race"), curves) for _ in range(2))
    whole.run(seed, until=middle)
    whole.run(seed)
    restarted.run(seed, until=middle)
    before = dict(restarted.stopped)
    restarted.restart()
    assert restarted.stopped == before, "what was reported before is not decided again"
    restarted.run(seed)
    assert restarted.stopped == whole.stopped


def test_models_never_compete(tmp_path: Path) -> None:
    curves = {"vanilla low": [5.0] * 8, "vanilla high": [6.0] * 8, "iiet": [9.0] * 8}
    race = Race(tmp_path, curves, model_of=lambda key: key.split()[0])
    for step in (2, 4, 8):
        for key in curves:
            if key not in race.stopped:
                race.validate(key, step)
    assert race.stopped == {"vanilla high": 2}


def test_trials_of_another_process_compete_too(tmp_path: Path) -> None:
    race = Race(tmp_path, {"here": [5.0] * 8, "elsewhere": [1.0] * 8})
    race.trials["elsewhere"].status = "TERMINATED"  # Another process had its lock.
    race.validate("elsewhere", 2, elsewhere=True)
    race.validate("here", 2)
    assert race.stopped == {"here": 2}


def test_a_trial_that_runs_here_is_decided_on_although_its_journal_came_first(
    tmp_path: Path,
) -> None:
    race = Race(tmp_path, {"a": [1.0] * 8, "b": [5.0] * 8})
    race.validate("b", 2, elsewhere=True)  # Its report is still on its way.
    race.validate("a", 2)
    race.asha.on_trial_result(None, race.trials["b"], {STEP: 2, LOSS: 5.0})
    assert race.stopped == {"b": 2}


def test_a_loss_that_is_no_number_is_neither_ended_nor_a_winner(tmp_path: Path) -> None:
    race = Race(tmp_path, {"a": [math.nan] * 8, "b": [3.0] * 8, "c": [math.inf] * 8})
    for key in ("a", "b", "c"):
        race.validate(key, 2)
    assert race.stopped == {}
