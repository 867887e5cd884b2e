"""Hours of several trainings, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from iiet.model.config import preset
from orchestrator.planning import price as pricing
from orchestrator.planning.devices import Devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.price import (
    CPU_PEAK_FLOPS,
    CPU_SHARES,
    GPU_SHARES,
    SECONDS_BESIDE_A_TRAINING,
    SECONDS_PER_EVALUATION,
    START_SECONDS,
    Price,
    assumed_rate,
    measuring_hours,
    price_of,
)
from orchestrator.settings import TrainingSettings
from orchestrator.workspace.processors import num_cpus

ON_ONE_GPU = Devices(on_gpus=True)


def estimate(precision: str, num_steps: int = 100) -> Estimate:
    values: dict[str, Any] = {"precision": precision, "num_steps": num_steps}
    recipe = TrainingSettings(num_tokens_per_step=1024, **values)
    return Estimate(config=preset("tiny"), recipe=recipe, devices=ON_ONE_GPU)


def test_hours_are_those_of_the_gpu_that_the_settings_name():
    on_named = replace(ON_ONE_GPU, gpu="A100-80GB")
    assert assumed_rate(on_named, "bf16").peak_flops == 312e12


def test_each_training_of_a_group_has_the_rate_of_its_own_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(pricing, "SECONDS_PER_EVALUATION", (0.0, 0.0))
    half = estimate("bf16")
    full = estimate("fp32", num_steps=300)
    half_rate = assumed_rate(ON_ONE_GPU, "bf16")
    full_rate = assumed_rate(ON_ONE_GPU, "fp32")
    assert half_rate.peak_flops > 2 * full_rate.peak_flops

    def price(*trainings: Estimate) -> Price:
        return price_of(trainings, tmp_path)

    seconds = half.flops / half_rate.peak_flops + full.flops / full_rate.peak_flops
    slowest, fastest = GPU_SHARES
    expected = (seconds / fastest / 3600, seconds / slowest / 3600)
    # In any order; the costliest training says which rate is shown.
    for trainings in (half, full), (full, half):
        priced = price(*trainings)
        assert priced.hours == pytest.approx(expected)
        assert priced.rate == full_rate
    # Two at a time take as long as the longer one.
    two_at_once = replace(ON_ONE_GPU, at_once=2)
    together = price(replace(half, devices=two_at_once), replace(full, devices=two_at_once))
    assert together.hours == pytest.approx(price(full).hours)
    assert together.num_devices == 2


def test_no_training_is_faster_than_its_host_starts_operations(tmp_path):
    tiny = estimate("bf16", num_steps=500)
    on_eight = replace(tiny, devices=Devices(num_workers=8, on_gpus=True))
    evaluations = 300 * 6 + 200 * 24  # Corrections begin after 60% of the steps.
    assert on_eight.num_evaluations == evaluations
    price = price_of([on_eight], tmp_path)
    expected = [evaluations * seconds / 3600 for seconds in SECONDS_PER_EVALUATION]
    assert price.hours == pytest.approx(expected)
    # Twice as many passes, twice as many operations.
    halved = tiny.recipe.model_copy(update={"num_sequences_per_pass": tiny.sequences_per_pass // 2})
    assert replace(tiny, recipe=halved).num_evaluations == 2 * tiny.num_evaluations


def test_what_is_measured_first_adds_its_time(tmp_path):
    shortest, longest = measuring_hours(1e15, 10, on_gpu=False)
    slowest_share, fastest_share = CPU_SHARES
    for hours, share in ((shortest, fastest_share), (longest, slowest_share)):
        assert hours == pytest.approx(1e15 / (num_cpus() * CPU_PEAK_FLOPS * share) / 3600)
    # Small models wait for their host.
    of_host = [1000 * seconds / 3600 for seconds in SECONDS_PER_EVALUATION]
    assert measuring_hours(1.0, 1000, on_gpu=True) == pytest.approx(of_host)
    trainings = [estimate("bf16")]
    alone = price_of(trainings, tmp_path)
    after = price_of(trainings, tmp_path, hours_of_influence=(shortest, longest))
    added = [after.additional_hours[end] - alone.additional_hours[end] for end in (0, 1)]
    assert added == pytest.approx([shortest, longest])
    assert after.hours == alone.hours


def test_each_round_of_trainings_adds_a_start_and_a_measurement(tmp_path):
    trainings = [replace(estimate("bf16"), devices=replace(ON_ONE_GPU, at_once=2))] * 3
    beside = zip(START_SECONDS, SECONDS_BESIDE_A_TRAINING, strict=True)
    expected = [(start + 2 * training) / 3600 for start, training in beside]
    assert price_of(trainings, tmp_path).additional_hours == pytest.approx(expected)
    assert price_of([], tmp_path).additional_hours == (0, 0)
