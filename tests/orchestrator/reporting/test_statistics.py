"""The bootstrap's errors and intervals equal closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from orchestrator.reporting.statistics import (
    Floats,
    ItemValues,
    Scores,
    draw_item_counts,
    draw_seed_weights,
    interval_of,
    mean_scores,
    on_front,
    resample,
)


def drawn(values: Floats, weights: Floats | None = None, seed: int = 0, num: int = 4000) -> Scores:
    """Score runs, each a model of its own."""
    model_of_run = np.arange(len(values))
    weights = np.ones(values.shape[1]) if weights is None else weights
    seed_weights = np.ones((num, len(values)))
    counts = draw_item_counts(values.shape[1], num, (seed,))
    return resample(ItemValues("acc", values, weights), seed_weights, model_of_run, counts)


def test_each_draw_has_the_number_of_items(monkeypatch):
    monkeypatch.setattr("orchestrator.reporting.statistics.MAX_COUNTS_PER_BLOCK", 50)
    blocks = list(draw_item_counts(7, 40, (0,)))
    assert len(blocks) > 1
    counts = np.vstack(blocks)
    assert counts.shape == (40, 7)
    assert set(counts.sum(axis=1)) == {7}
    assert len(np.unique(counts, axis=0)) > 30


def test_the_error_of_a_mean_difference_matches_the_formula():
    rng = np.random.default_rng(1)
    ability = rng.random(500)
    pair = (rng.random((2, 500)) < ability + np.array([[0.0], [0.05]])).astype(float)
    scores = drawn(pair)
    difference = pair[1] - pair[0]
    spread = (scores.drawn[:, 1] - scores.drawn[:, 0]).std()
    assert spread == pytest.approx(difference.std(ddof=1) / math.sqrt(500), rel=0.05)
    # Common hard items cancel: two separate errors would add up to more.
    assert spread < 0.9 * math.hypot(scores.drawn[:, 0].std(), scores.drawn[:, 1].std())
    assert scores.difference(1, 0).value == pytest.approx(difference.mean())


def test_the_error_of_a_ratio_of_sums_matches_the_delta_method():
    rng = np.random.default_rng(2)
    weights = rng.integers(500, 5000, size=200).astype(float)
    values = (2.0 + 0.3 * rng.standard_normal((1, 200))) * weights
    scores = drawn(values, weights)
    ratio = float(values.sum() / weights.sum())
    residual = (values[0] - ratio * weights) / weights.mean()
    assert scores.observed[0] == pytest.approx(ratio)
    assert scores.drawn.std() == pytest.approx(residual.std(ddof=1) / math.sqrt(200), rel=0.06)


def test_equal_models_differ_by_exactly_zero():
    row = np.random.default_rng(3).standard_normal(301) + 9
    scores = drawn(np.stack([row, row - 1, row]))
    difference = scores.difference(0, 2)
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    ratio = scores.ratio(0, 2)
    assert ratio is not None
    assert (ratio[0].low, ratio[0].high) == (1.0, 1.0)
    assert drawn(np.array([[1.0, 1.0], [0.0, 0.0]])).ratio(0, 1) is None


def test_an_interval_covers_the_truth_at_its_level():
    rng = np.random.default_rng(4)
    truth = 0.04
    num_trials = 200
    covered = 0
    for trial in range(num_trials):
        base = rng.random((1, 150))
        pair = (base + 0.1 * rng.random((2, 150)) < np.array([[0.5], [0.54]])).astype(float)
        interval = drawn(pair, seed=trial, num=400).difference(1, 0)
        covered += interval.low <= truth <= interval.high
    # 95% of 200, less three standard errors and the few items' too narrow percentiles.
    assert 0.88 <= covered / num_trials <= 0.99


def test_seeds_are_drawn_before_items():
    # Items without spread leave the error of the seeds: s / sqrt(n).
    seeds = np.array([0.2, 0.3, 0.5, 0.4])
    values = np.repeat(seeds[:, None], 50, axis=1)
    model_of_run = np.array([0, 0, 0, 0, 1])
    values = np.vstack([values, np.full((1, 50), 0.3)])
    weights = draw_seed_weights(model_of_run, 8000, np.random.default_rng(5))
    assert np.allclose(weights[:, :4].sum(axis=1), 1.0)
    assert np.all(weights[:, 4] == 1.0)
    # Models that have as many seeds share them, so what a seed does to both cancels.
    shared_weights = draw_seed_weights(np.array([0, 0, 1, 1]), 100, np.random.default_rng(5))
    assert np.array_equal(shared_weights[:, :2], shared_weights[:, 2:])
    assert len(np.unique(shared_weights[:, 0])) == 3
    counts = draw_item_counts(50, 8000, (6,))
    scores = resample(ItemValues("acc", values, np.ones(50)), weights, model_of_run, counts)
    assert scores.observed == pytest.approx([seeds.mean(), 0.3])
    assert scores.drawn[:, 0].std() == pytest.approx(seeds.std() / 2, rel=0.05)
    assert scores.drawn[:, 1].std() == pytest.approx(0.0, abs=1e-12)


def test_the_variances_of_seeds_and_items_add_up():
    rng = np.random.default_rng(7)
    seeds = 0.5 + 0.05 * rng.standard_normal(6)
    items = 0.3 * rng.standard_normal(80)
    values = seeds[:, None] + items[None, :]
    model_of_run = np.zeros(6, dtype=np.int64)
    weights = draw_seed_weights(model_of_run, 8000, rng)
    counts = draw_item_counts(80, 8000, (7,))
    scores = resample(ItemValues("acc", values, np.ones(80)), weights, model_of_run, counts)
    expected = math.hypot(seeds.std() / math.sqrt(6), items.std() / math.sqrt(80))
    assert scores.drawn.std() == pytest.approx(expected, rel=0.05)


def test_the_mean_of_tasks_is_taken_of_what_was_measured_and_of_each_draw():
    first_task = Scores(np.array([0.5, 0.7]), np.array([[0.4, 0.6], [0.6, 0.9], [0.5, 0.6]]))
    second_task = Scores(np.array([0.1, 0.3]), np.array([[0.2, 0.2], [0.0, 0.5], [0.1, 0.2]]))
    mean = mean_scores([first_task, second_task])
    np.testing.assert_allclose(mean.observed, [0.3, 0.5])
    np.testing.assert_allclose(mean.drawn, [[0.3, 0.4], [0.3, 0.7], [0.3, 0.4]])
    assert mean.interval(0).value == pytest.approx(0.3)


def keeps(lost: int, num_items: int, *, gained: int = 0, demanded: float = 0.99) -> float:
    """Return the confidence that a model keeps a share of the accuracy of one that is right on all
    items but the gained ones."""
    full = np.ones(num_items)
    model = np.ones(num_items)
    model[:lost] = 0
    full[lost : lost + gained] = 0
    cautious = drawn(np.stack([model, full])).cautious_ratio(0, 1, num_items=num_items)
    assert cautious is not None
    return float((cautious[1] >= demanded).mean())


@pytest.mark.parametrize("num_items", [40, 400])
def test_the_confidence_falls_with_each_item_that_is_lost(num_items):
    confidences = [keeps(lost, num_items) for lost in range(8)]
    assert confidences == sorted(confidences, reverse=True)
    assert confidences[0] > confidences[1] > confidences[2]
    # With nothing lost, it is that of the exact upper bound of a share: 1 - 0.99^n.
    assert confidences[0] == pytest.approx(1 - 0.99**num_items, abs=0.02)
    assert keeps(2, num_items, gained=2) > keeps(2, num_items)


def test_two_equal_models_may_differ_in_what_they_keep_of_a_third():
    scores = drawn(np.ones((3, 100)))
    ratios = [scores.cautious_ratio(model, 2, num_items=100) for model in (0, 1)]
    assert ratios[0]
    assert ratios[1]
    difference = ratios[0][1] - ratios[1][1]
    # Each keeps 1 - x, where x of Beta(1, 100) has a standard deviation of nearly 0.01.
    assert difference.std() == pytest.approx(0.01 * math.sqrt(2), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("num_items", [40, 400])
@pytest.mark.parametrize("accuracy", [0.3, 0.9])
@pytest.mark.parametrize("share_changed", [0.0, 0.1])
def test_few_models_at_the_border_are_sure_to_keep_the_share(num_items, accuracy, share_changed):
    """The model keeps exactly 99%: it loses 1% of the right answers, and as many as it gains."""
    rng = np.random.default_rng(11)
    num_runs = 300
    num_sure = 0
    for run in range(num_runs):
        full = rng.random(num_items) < accuracy
        gained = ~full & (rng.random(num_items) < share_changed * accuracy / (1 - accuracy))
        lost = full & (rng.random(num_items) < 0.01 + share_changed)
        pair = np.stack([(full & ~lost) | gained, full]).astype(float)
        cautious = drawn(pair, seed=run, num=400).cautious_ratio(0, 1, num_items=num_items)
        if cautious is not None:
            num_sure += float((cautious[1] >= 0.99).mean()) >= 0.95
    # 5%, and two standard errors of 300 runs.
    assert num_sure / num_runs <= 0.05 + 0.025


def test_the_fronts_of_draws_follow_the_definition_of_a_front():
    rng = np.random.default_rng(9)
    costs = np.array([2.0, 1.0, 2.0, 3.0, 1.0])
    goodness = rng.integers(0, 4, size=(300, 5)).astype(float)

    def is_member(row: Floats, j: int) -> bool:
        return not any(
            costs[i] <= costs[j] and row[i] >= row[j] and (costs[i] < costs[j] or row[i] > row[j])
            for i in range(5)
        )

    expected = [[is_member(row, j) for j in range(5)] for row in goodness]
    np.testing.assert_array_equal(on_front(costs, goodness), expected)


def test_an_interval_contains_its_share_of_the_draws():
    interval = interval_of(0.5, np.linspace(0.0, 1.0, 1001), level=0.9)
    assert (interval.low, interval.high) == pytest.approx((0.05, 0.95))
    assert interval.excludes_zero
