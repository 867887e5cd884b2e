"""Checks of the values of dataclasses: all rules that are broken, in one error.

Settings, configs and results are made in many places; each says at once which of its values is
wrong, instead of a formula that fails later or computes something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["check_rules", "is_integer_from", "is_nan", "is_number_from"]


def check_rules(subject: str, values: object, rules: Mapping[str, bool]) -> None:
    """Raise one ValueError for all rules that do not hold.

    Args:
        subject: what the values make, such as `distillation config`.
        values: the object whose values are checked.
        rules: a rule, and whether it holds. Its first word is the name of the value that it is
            about, which the error shows.

    Raises:
        ValueError: a rule does not hold.
    """
    problems = [
        f"{rule}, got {getattr(values, rule.split()[0])!r}"
        for rule, holds in rules.items()
        if not holds
    ]
    if problems:
        raise ValueError(f"invalid {subject}: {'; '.join(problems)}")


def is_number_from(least: float, value: object, most: float = math.inf) -> bool:
    """Return whether a value is a finite number of this range, both ends included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and least <= value <= most


def is_nan(value: object) -> bool:
    """Return whether a value is NaN, which stands for an unknown number."""
    return isinstance(value, float) and math.isnan(value)


def is_integer_from(least: int, value: object) -> bool:
    """Return whether a value is an integer of at least this size."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
