"""Intervals and confidences equal closed forms; `test_coverage_study.py` has their coverage."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, t, ttest_1samp

from orchestrator.reporting.statistics import (
    Estimate,
    Floats,
    ItemValues,
    Scores,
    corrected,
    mean_scores,
    resolvable_difference,
    sum_of_means,
)


def scores_of(values: Floats, num_seeds: list[int] | None = None, metric: str = "acc") -> Scores:
    """Score runs over equal items, each a model of its own unless `num_seeds` says otherwise."""
    items = ItemValues(metric, values, np.ones(values.shape[1]))
    return items.scores(num_seeds or [1] * len(values))


def exact(model: float, other: float, num_items: int = 50) -> Floats:
    """Return two runs whose items are all alike."""
    return np.repeat([[model], [other]], num_items, axis=1)


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
def test_over_seeds_alone_an_interval_is_that_of_students_t(num_seeds):
    differences = np.random.default_rng(0).standard_normal(num_seeds)
    interval = sum_of_means([differences]).interval()
    expected = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected))
    assert interval.over == "seeds"
    p_value = ttest_1samp(differences, 0.3, alternative="greater").pvalue
    assert sum_of_means([differences]).confidence_above(0.3) == pytest.approx(1 - p_value)


def test_over_the_items_of_one_seed_an_interval_is_that_of_the_differences_by_item():
    rng = np.random.default_rng(1)
    ability = rng.random(500)
    pair = (rng.random((2, 500)) < ability + np.array([[0.0], [0.05]])).astype(float)
    estimate = scores_of(pair, metric="bits_per_byte").difference(1, 0)
    expected = ttest_1samp(pair[1] - pair[0], 0).confidence_interval(0.95)
    interval = estimate.interval()
    assert (interval.low, interval.high) == pytest.approx(tuple(expected))
    assert interval.over == "items of one seed"
    # An accuracy counts one item more on each side.
    more = scores_of(pair).difference(1, 0).error
    assert more == pytest.approx(math.sqrt(estimate.items_variance + 2 / 500**2))
    # Common hard items cancel: two separate errors would add up to more.
    scores = scores_of(pair)
    assert more < 0.9 * math.hypot(scores.score(0).error, scores.score(1).error)


def test_the_error_of_a_ratio_of_sums_matches_the_delta_method():
    rng = np.random.default_rng(2)
    weights = rng.integers(500, 5000, size=200).astype(float)
    values = (2.0 + 0.3 * rng.standard_normal((1, 200))) * weights
    score = ItemValues("bits_per_byte", values, weights).scores([1]).score(0)
    ratio = float(values.sum() / weights.sum())
    residual = (values[0] - ratio * weights) / weights.mean()
    assert score.value == pytest.approx(ratio)
    assert score.error == pytest.approx(residual.std(ddof=1) / math.sqrt(200))


def test_equal_models_differ_by_exactly_zero_in_bits_and_by_an_item_in_accuracy():
    row = np.random.default_rng(3).standard_normal(301) + 9
    scores = scores_of(np.stack([row, row - 1, row]), metric="bits_per_byte")
    difference = scores.difference(0, 2).interval()
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    share = scores.share(0, 2)
    assert share is not None
    assert (share.low, share.high) == (1.0, 1.0)
    assert scores_of(np.array([[1.0, 1.0], [0.0, 0.0]])).share(0, 1) is None
    equal = scores_of(np.ones((2, 400))).difference(0, 1).interval()
    assert equal.high == pytest.approx(t.ppf(0.975, 399) * math.sqrt(2) / 400)


def test_what_seeds_have_in_common_cancels_in_a_difference():
    seeds = np.array([0.2, 0.3, 0.5])
    shifted = np.concatenate([seeds, seeds + 0.1])
    values = np.repeat(shifted[:, None], 50, axis=1)
    scores = scores_of(values, [3, 3], metric="bits_per_byte")
    assert scores.difference(1, 0).error == pytest.approx(0)
    expected = seeds.std(ddof=1) / math.sqrt(3)
    assert scores.score(0).error == pytest.approx(expected)
    # Of models with other numbers of seeds nothing cancels; a single seed varies as the others do.
    mixed = scores_of(values[:4], [3, 1], metric="bits_per_byte").difference(1, 0)
    assert mixed.error == pytest.approx(seeds.std(ddof=1) * math.sqrt(1 / 3 + 1))
    assert mixed.seeds_freedom == 2


def test_items_add_what_all_seeds_have_in_common():
    rng = np.random.default_rng(7)
    common = rng.standard_normal(2000)
    own = rng.standard_normal((6, 2000))
    of_seeds = 0.1 * rng.standard_normal((6, 1))
    for share in (0.0, 1.0):
        values = of_seeds + share * common + own
        estimate = scores_of(values, [6], metric="bits_per_byte").score(0)
        means = values.mean(axis=1)
        assert estimate.seeds_variance == pytest.approx(means.var(ddof=1) / 6)
        assert estimate.items_variance == pytest.approx(share / 2000, rel=0.1, abs=5e-5)


def test_an_interval_is_the_longer_one_of_seeds_alone_and_seeds_with_items():
    little = Estimate(
        0.0, seeds_variance=1.0, seeds_freedom=1, items_variance=0.01, items_freedom=99
    )
    assert little.half_width() == pytest.approx(math.sqrt(1 - 0.06 * 0.01) * t.ppf(0.975, 1))
    more = replace(little, items_variance=4.0)  # Of two seeds, 0.06 of it is taken off.
    assert more.half_width() == pytest.approx(math.sqrt(1 - 0.06 * 4) * t.ppf(0.975, 1))
    much = Estimate(0.0, seeds_variance=1.0, seeds_freedom=1, items_variance=1e6, items_freedom=99)
    assert much.half_width() == pytest.approx(1e3 * t.ppf(0.975, 99), rel=1e-4)
    equal = Estimate(0.0, seeds_variance=1.0, seeds_freedom=4, items_variance=2.0, items_freedom=50)
    freedom = 3**2 / (1 / 4 + 2**2 / 50)  # Satterthwaite's.
    assert equal.half_width() == pytest.approx(math.sqrt(3) * t.ppf(0.975, freedom))
    assert equal.interval(num_comparisons=5).high == pytest.approx(equal.half_width(0.99))
    # The confidence is that of the same interval.
    for estimate in (little, much, equal):
        assert estimate.confidence_above(-estimate.half_width()) == pytest.approx(0.975)
        assert estimate.confidence_above(estimate.half_width()) == pytest.approx(0.025)


def test_the_mean_of_tasks_has_half_of_both_errors():
    rng = np.random.default_rng(5)
    first = scores_of((rng.random((2, 100)) < 0.5).astype(float))
    second = scores_of((rng.random((2, 40)) < 0.8).astype(float))
    mean = mean_scores([first, second])
    np.testing.assert_allclose(mean.observed, (first.observed + second.observed) / 2)
    one, other = first.difference(0, 1), second.difference(0, 1)
    difference = mean.difference(0, 1)
    assert difference.value == pytest.approx((one.value + other.value) / 2)
    assert difference.error == pytest.approx(math.hypot(one.error, other.error) / 2)
    assert difference.items_freedom == 39, "that of the smaller task"


def test_confidences_of_several_are_corrected_step_by_step():
    # Holm's: 3 x 0.01, then 2 x 0.02, and never surer than the one before.
    several = corrected({"b": 0.98, "a": 0.99, "c": 0.979})
    assert several == pytest.approx({"a": 0.97, "b": 0.96, "c": 0.96})
    assert corrected({"one": 0.9}) == pytest.approx({"one": 0.9})
    assert corrected({"one": 0.2, "other": 0.1}) == {"one": 0.0, "other": 0.0}


def test_what_a_sweep_can_tell_apart():
    # The examples of 700 and 1,000 items of which 6% differ.
    assert 100 * resolvable_difference(700, 0.06) == pytest.approx(2.6, abs=0.05)
    assert 100 * resolvable_difference(1000, 0.06) == pytest.approx(2.2, abs=0.05)
    estimate = Estimate(0.0, items_variance=0.06 / 1000, items_freedom=math.inf)
    assert estimate.resolvable == pytest.approx(resolvable_difference(1000, 0.06))


def keeps(lost: int, num_items: int, *, gained: int = 0, demanded: float = 0.99) -> float:
    """Return the confidence that a model keeps a share of the accuracy of one that is right on all
    items but the gained ones."""
    full = np.ones(num_items)
    model = np.ones(num_items)
    model[:lost] = 0
    full[lost : lost + gained] = 0
    return scores_of(np.stack([model, full])).confidence_keeps(0, 1, demanded)


@pytest.mark.parametrize("num_items", [40, 400])
def test_the_confidence_falls_with_each_item_that_is_lost(num_items):
    confidences = [keeps(lost, num_items) for lost in range(8)]
    assert confidences == sorted(confidences, reverse=True)
    assert confidences[0] > confidences[1] > confidences[2]
    # Where it matters it is at most that of the exact bound of a share (Clopper and Pearson, 1934).
    for lost, confidence in enumerate(confidences):
        if confidence > 0.5:
            assert confidence < 1 - binom.cdf(lost, num_items, 0.01) + 0.01
    assert confidences[0] == pytest.approx(1 - 0.99**num_items, abs=0.02)
    assert keeps(2, num_items, gained=2) > keeps(2, num_items)
    # A model keeps all of itself, and no more.
    itself = scores_of(np.ones((1, num_items)))
    assert [itself.confidence_keeps(0, 0, share) for share in (1.0, 1.01)] == [1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("num_items", [40, 400, 1000])
@pytest.mark.parametrize("accuracy", [0.3, 0.9])
@pytest.mark.parametrize("share_changed", [0.0, 0.1])
def test_few_models_at_the_border_are_sure_to_keep_the_share(num_items, accuracy, share_changed):
    """The model keeps exactly 99%: it loses 1% of the right answers, and as many as it gains."""
    rng = np.random.default_rng(11)
    num_runs = 1000
    num_sure = 0
    for _ in range(num_runs):
        full = rng.random(num_items) < accuracy
        gained = ~full & (rng.random(num_items) < share_changed * accuracy / (1 - accuracy))
        lost = full & (rng.random(num_items) < 0.01 + share_changed)
        pair = np.stack([(full & ~lost) | gained, full]).astype(float)
        num_sure += scores_of(pair).confidence_keeps(0, 1, 0.99) >= 0.95
    # 5%, and two standard errors of 1,000 runs.
    assert num_sure / num_runs <= 0.05 + 0.014
