"""Intervals hold the truth, and verdicts are rarely false, where the truth is known."""

from __future__ import annotations

import coverage_study
import pytest
from coverage_study import ACCURACY, World, coverage, difference, false_share, mean

NUM_RUNS = 600
"""The standard error of a coverage of 95% is then 0.9 points."""
NUM_SWEEPS = 80
"""That of 5% false verdicts is then 2.4 points."""


@pytest.mark.slow
@pytest.mark.parametrize("share_of_model", [0.0, 0.25])
@pytest.mark.parametrize(
    ("num_seeds", "seed_spread"),
    [(1, 0.0), *((seeds, spread) for seeds in (2, 3, 5, 10) for spread in (0.005, 0.03, 0.12))],
)
def test_intervals_hold_the_truth_in_95_of_100_runs(num_seeds, seed_spread, share_of_model):
    world = World(
        num_seeds=num_seeds, seed_spread=seed_spread, share_of_model=share_of_model, num_items=300
    )
    for interval_of, truth in ((difference, 0.0), (mean, ACCURACY)):
        share = coverage(world, interval_of, truth, runs=NUM_RUNS)
        assert 0.94 - 2.5 * 0.009 <= share <= 0.96 + 2.5 * 0.009


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("name", coverage_study.VERDICTS)
def test_few_verdicts_are_false(name, num_seeds):
    world = World(num_seeds=num_seeds, seed_spread=0.01 * (num_seeds > 1), num_items=300)
    share = false_share(name, world, num_students=8, sweeps=NUM_SWEEPS)
    assert share <= 0.05 + 2 * 0.024
