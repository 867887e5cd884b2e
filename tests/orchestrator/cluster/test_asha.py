"""Of one model's learning rates the best continues at every rung, and models never compete."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.cluster.tune import LOSS, STEP, AshaByModel
from orchestrator.records.evaluation import Suite
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import AshaRule, EarlyStop, Trial
from orchestrator.settings import TrainingSettings

NUM_STEPS = 8
CURVES = st.lists(st.lists(st.floats(1.0, 9.0), min_size=8, max_size=8), min_size=1, max_size=7)


class Race:
    """Trains made-up curves, and ends those that are stopped; a label's first word is its model."""

    def __init__(
        self, folder: Path, curves: Mapping[str, Sequence[float]], reduction_factor: int = 2
    ) -> None:
        self.folder = folder
        self.curves = curves
        self.reached = dict.fromkeys(curves, 0)
        models: dict[str, list[Trial]] = {}
        for label in curves:
            models.setdefault(label.split()[0], []).append(self.trial(label))
        rule = AshaRule(first_rung=0.25, reduction_factor=reduction_factor)
        self.stops: dict[str, EarlyStop] = {}
        self.scheduler = AshaByModel(rule, [*models.values()], self, None)
        self.tune_trials = {
            label: SimpleNamespace(config={"key": label}, trial_id=label) for label in curves
        }
        for trial in self.tune_trials.values():
            self.scheduler.on_trial_add(None, trial)

    def trial(self, label: str) -> Trial:
        model = ModelConfig(
            vocab_size=8, dim=8, num_layers=1, num_heads=1, num_kv_heads=1, ffn_dim=8,
            context_length=8, schedule=IterationSchedule((1,)),
        )  # fmt: skip
        recipe = TrainingSettings(num_steps=NUM_STEPS)
        job = TrainingJob(run_folder="", tokens_folder="", model=model, recipe=recipe)
        return Trial(
            key=label, role="trial", label=label, model=model, job=job,
            folder=str(self.folder / label), suite=Suite(),
        )  # fmt: skip

    def on_early_stop(self, key: str, stop: EarlyStop) -> None:
        self.stops[key] = stop

    @property
    def stopped(self) -> dict[str, int]:
        return {label: stop.step for label, stop in self.stops.items()}

    def validate(self, label: str, step: int) -> None:
        self.reached[label] = step
        result = {STEP: step, LOSS: self.curves[label][step - 1]}
        decision = self.scheduler.on_trial_result(None, self.tune_trials[label], result)
        assert decision == "CONTINUE", "Tune kills nothing"

    def run(self, seed: int, gap: int = 1) -> None:
        """Train in a random order, and validate every `gap` steps."""
        order = random.Random(seed)
        while waiting := [
            label for label, step in self.reached.items()
            if label not in self.stopped and step + gap <= NUM_STEPS
        ]:  # fmt: skip
            label = order.choice(waiting)
            self.validate(label, self.reached[label] + gap)


@settings(max_examples=examples(25))
@given(CURVES, st.integers(2, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_best_at_a_rung_continues_whoever_came_first(
    tmp_path_factory, losses, reduction_factor, gap, seed
):
    curves = {f"iiet {n}": curve for n, curve in enumerate(losses)}
    race = Race(tmp_path_factory.mktemp("race"), curves, reduction_factor)
    race.run(seed, gap)
    for label, step in race.stopped.items():
        rungs = [2 * reduction_factor**n for n in range(3)]
        assert [rung for rung in rungs if step - gap < rung <= step]
        assert step < NUM_STEPS
        assert curves[label][step - 1] > min(curve[step - 1] for curve in curves.values())
    assert len(race.stopped) < len(curves), "one is trained to its end"


def test_models_never_compete_and_the_reason_names_the_best_rival(tmp_path):
    curves = {"vanilla low": [5.0] * 8, "vanilla lower": [4.0] * 8, "vanilla high": [6.0] * 8}
    curves |= {"iiet": [9.0] * 8, "other nan": [math.nan] * 8, "other infinite": [math.inf] * 8}
    race = Race(tmp_path, curves)
    for step in (2, 4, 8):
        for label in curves:
            if label not in race.stopped:
                race.validate(label, step)
    assert race.stopped == {"vanilla high": 2}, "who comes first at a rung continues"
    stop = race.stops["vanilla high"]
    assert stop.competitor == "vanilla lower"
    assert stop.text == (
        "stopped early at step 2 of 8: its validation loss is 6.000, vanilla lower had 4.000"
    )


def test_a_trial_that_starts_again_stays_one_competitor(tmp_path):
    race = Race(tmp_path, {"iiet low": [4.0, 4.0, 9.0] + [9.0] * 5, "iiet high": [5.0] * 8})
    race.validate("iiet low", 2)
    second_start = SimpleNamespace(config={"key": "iiet low"}, trial_id="second start")
    race.tune_trials["iiet low"] = second_start
    race.scheduler.on_trial_add(None, second_start)
    race.validate("iiet low", 3)
    race.validate("iiet high", 2)
    assert race.stopped == {"iiet high": 2}, "the loss of step 3 is not one of the first rung"


def test_a_beaten_trial_that_dies_and_starts_again_is_asked_again_to_end(tmp_path):
    race = Race(tmp_path, {"iiet low": [4.0] * 8, "iiet high": [5.0] * 8})
    race.validate("iiet low", 2)
    race.validate("iiet high", 2)
    assert race.stopped == {"iiet high": 2}
    race.tune_trials["iiet high"] = SimpleNamespace(
        config={"key": "iiet high"}, trial_id="second start"
    )
    race.scheduler.on_trial_add(None, race.tune_trials["iiet high"])
    race.validate("iiet high", 3)  # Between two rungs, where ASHA decides nothing.
    assert race.stopped == {"iiet high": 3}
