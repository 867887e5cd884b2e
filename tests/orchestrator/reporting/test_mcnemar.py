"""McNemar's exact test against exact fractions, and Holm's correction against its definition."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from orchestrator.reporting.mcnemar import McNemar, adjust_by_holm, count_discordant


@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (5, 0), (6, 6), (3, 14), (120, 171)])
def test_the_p_value_is_that_of_the_binomial_distribution(counts: tuple[int, int]) -> None:
    num_items = sum(counts)
    tail = sum(comb(num_items, k) for k in range(min(counts) + 1))
    exact = min(Fraction(1), Fraction(2 * tail, 2**num_items))
    assert McNemar(*counts).p_value == pytest.approx(float(exact), rel=1e-10)
    assert McNemar(*counts[::-1]).p_value == McNemar(*counts).p_value


def test_many_items_neither_overflow_nor_vanish() -> None:
    # A difference of two standard deviations, sqrt(200,000), has the p-value of a normal deviate.
    assert McNemar(99_553, 100_447).p_value == pytest.approx(0.0456, abs=3e-4)


def test_right_and_wrong_items_are_counted_and_other_values_refused() -> None:
    values = np.array([[1, 1, 0, 0, 1], [1, 0, 1, 0, 0]], dtype=float)
    assert count_discordant(values) == McNemar(only_first=2, only_second=1)
    assert McNemar(2, 1) + McNemar(1, 5) == McNemar(3, 6)
    assert count_discordant(values * 0.5) is None


def test_holm_multiplies_the_smallest_by_the_number_of_tests_and_keeps_the_order() -> None:
    adjusted = adjust_by_holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.9})
    assert adjusted == pytest.approx({"b": 0.04, "c": 0.09, "a": 0.09, "d": 0.9})
