"""Numbers as people read them: counts with their noun, format_hours_range, bytes and FLOP rates."""

from __future__ import annotations


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """Write a number of things; the plural is the noun with an s unless given."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def format_bytes(value: float) -> str:
    """Write bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value / 1024:.1f} KiB"


def format_hours_range(least: float, most: float) -> str:
    """Write a range of hours for people."""
    return _range(format_hours(least), format_hours(most))


def format_hours(hours: float) -> str:
    """Write hours for people, in seconds, minutes or days where that reads better."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} seconds"
    if hours < 1:
        return f"{hours * 60:.2g} minutes"
    return f"{hours:.3g} hours" if hours < 48 else f"{hours / 24:.3g} days"


def format_flop_rates(best: float, usual: float) -> str:
    """Write a range of FLOP/s for people."""
    return _range(*(f"{speed / 1e12:,.3g} TFLOP/s" for speed in (best, usual)))


def _range(first: str, second: str) -> str:
    if first == second:
        return first
    number, unit = first.split(" ", 1)
    return f"{number if second.endswith(f' {unit}') else first} to {second}"
