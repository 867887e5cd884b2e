"""How many random examples a law is tried on: few in each run, twenty times as many in
`make test-long`."""

from __future__ import annotations

import os

FACTOR_VARIABLE = "IIET_LAW_EXAMPLES"
"""Says how many times as many examples there are."""
USUAL_EXAMPLES = 100
"""Examples of a law that sets no number."""


def examples(number: int) -> int:
    """Return how many examples a law has in this run, which has `number` in the quick tests."""
    return number * int(os.environ.get(FACTOR_VARIABLE, "1"))
