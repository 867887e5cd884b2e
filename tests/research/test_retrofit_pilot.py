"""The pilot's verdict follows from its numbers, and its table from the stored evaluation."""

import pytest
from retrofit_pilot import Pilot, filled
from retrofit_results import DOES_NOT_PAY, NOT_DECIDED, PAGE, PAYS


def pilot(gain_low: float, gain_high: float, *, answered: float = 0.5, bits: float = 0.9) -> Pilot:
    """Return measurements of a corrected model; its source has 1 bit per byte."""
    return Pilot(
        answered={"smollm2": 0.14, "plain": 0.2, "corrected": answered},
        bits={"smollm2": 1.0, "plain": 0.9, "corrected": bits},
        gain=(gain_low + gain_high) / 2,
        gain_low=gain_low,
        gain_high=gain_high,
    )


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (pilot(0.01, 0.03), PAYS),
        (pilot(0.01, 0.06), PAYS),
        (pilot(-0.01, 0.06), NOT_DECIDED),
        (pilot(-0.04, 0.01), DOES_NOT_PAY),
        (pilot(0.1, 0.2, bits=1.03), DOES_NOT_PAY),
        (pilot(0.1, 0.2, bits=1.01), PAYS),
        (pilot(0.1, 0.2, answered=0.24), NOT_DECIDED),
    ],
)
def test_the_verdict_is_that_of_the_rule(measured, verdict):
    assert measured.verdict == verdict


def test_the_page_is_made_from_the_stored_evaluation():
    text = PAGE.read_text("utf-8")
    assert filled(text) == text, "python research/retrofit_pilot.py"
