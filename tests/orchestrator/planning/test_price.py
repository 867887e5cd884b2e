"""Hours of several trainings, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from iiet.config import preset
from orchestrator.planning.devices import Devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.price import GPU_SHARES, Price, assumed_rate, price_of
from orchestrator.settings import TrainingSettings

ON_ONE_GPU = Devices(on_gpus=True)


def estimate(precision: str, num_steps: int = 100) -> Estimate:
    values: dict[str, Any] = {"precision": precision, "num_steps": num_steps}
    recipe = TrainingSettings(num_tokens_per_step=1024, **values)
    return Estimate(config=preset("tiny"), recipe=recipe, devices=ON_ONE_GPU)


def test_each_training_of_a_group_has_the_rate_of_its_own_precision(tmp_path):
    half = estimate("bf16")
    full = estimate("fp32", num_steps=300)
    half_rate = assumed_rate(half)
    full_rate = assumed_rate(full)
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
