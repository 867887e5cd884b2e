"""How tables, pages and sentences write a model, a number with its error, a confidence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from orchestrator.reporting.bootstrap import Interval
from orchestrator.reporting.pareto import Front, Placed
from orchestrator.reporting.style import is_accuracy, title_of

LONGEST_PLAIN_SCHEDULE = 16


def model_name(point: Placed) -> str:
    """Return what a row is called: a label of its own, or the schedule."""
    result = point.result
    is_named = result.label and result.label != result.schedule_text
    return result.label if is_named else short_schedule(result.schedule) or result.name


def full_name(front: Front, point: Placed) -> str:
    """Return a model's name, with its sweep where another one on the front has the same name."""
    name = model_name(point)
    is_shared = front.series and sum(model_name(other) == name for other in front.placed) > 1
    return f"{name} ({front.series[point.result.key]})" if is_shared else name


def listed(names: Sequence[str]) -> str:
    """Join names by commas, or by semicolons where a name has commas itself, as schedules do."""
    return ("; " if any("," in name for name in names) else ", ").join(names)


def short_schedule(schedule: Sequence[int] | None) -> str:
    """Return a schedule as it is typed; a long one with repetitions counted: `3*4,1*20`."""
    plain = ",".join(str(r) for r in schedule or ())
    if len(plain) <= LONGEST_PLAIN_SCHEDULE:
        return plain
    runs = [(r, len(list(same))) for r, same in groupby(schedule or ())]
    return ",".join(f"{r}*{count}" if count > 1 else str(r) for r, count in runs)


def quality_text(front: Front, point: Placed) -> str:
    """Return a quality with its standard error, an accuracy in percent: `44.4 ± 1.2`."""
    return with_error(point.quality, point.error, is_percent=is_accuracy(front.axes.quality))


def with_error(value: float, error: float | None, *, is_percent: bool) -> str:
    """Return a number with its standard error, a share in percent without the sign."""
    scale, digits = _form(value, is_percent=is_percent)
    text = f"{scale * value:.{digits}f}"
    return text if not error else f"{text} ± {scale * error:.{digits}f}"


def difference_text(interval: Interval, *, is_percent: bool) -> str:
    """Return a difference with its interval: `-0.9 (-2.1 to +0.3)`, shares in points."""
    scale, digits = _form(interval.value, is_percent=is_percent)
    value, low, high = (
        _signed(scale * number, digits) for number in (interval.value, interval.low, interval.high)
    )
    return f"{value} ({low} to {high})"


def range_text(interval: Interval, *, is_percent: bool) -> str:
    """Return the range of an interval alone: `31.2 to 36.1`."""
    scale, digits = _form(interval.value, is_percent=is_percent)
    return f"{scale * interval.low:.{digits}f} to {scale * interval.high:.{digits}f}"


def cost_text(cost: float) -> str:
    """Return a cost with four digits, or in full where it is a number of thousands."""
    return f"{cost:,.0f}" if 1000 <= cost < 1e7 else f"{cost:.4g}"


def confidence_text(share: float | None) -> str:
    """Return a share of the draws with two digits; no number of draws makes a thing certain."""
    if share is None:
        return ""
    if share > 0.99:
        return ">0.99"
    return "<0.01" if share < 0.01 else f"{share:.2f}"


def verdict(front: Front, point: Placed) -> str:
    """Return what the front says about a model: a pick, on the front, dominated, or its role."""
    if not point.is_candidate:
        beaten = len(front.beaten_by(point))
        return f"beats {beaten} ●" if beaten else ""
    if not point.on_front:
        return ""
    picks = [("knee", front.knee), ("best", front.best), ("cheapest", front.cheapest)]
    names = [name for name, pick in picks if pick is point]
    return " ".join(["●", *names])


def hypervolume_text(front: Front) -> str:
    """Return the hypervolume with the box that it is a share of; empty if there is none."""
    volume, area = front.hypervolume, front.box
    if volume is None or area is None:
        return ""
    quality = title_of(front.axes.quality).lower()
    is_percent = is_accuracy(front.axes.quality)
    unit = " %" if is_percent else ""
    low, high = (
        with_error(number, None, is_percent=is_percent) + unit
        for number in (area.quality, area.full_quality)
    )
    cost = title_of(front.axes.cost)
    cost = cost if cost[:2].isupper() else cost[0].lower() + cost[1:]
    return (
        f"hypervolume {volume:.3f}, as a share of the box from 0 to {cost_text(area.cost)} "
        f"({cost}) and from {quality} {low} to the full model's {high}"
    )


def _form(value: float, *, is_percent: bool) -> tuple[float, int]:
    """Return the factor and the digits that a number is shown with."""
    if is_percent:
        return 100.0, 1
    return 1.0, 3 if abs(value) < 10 else 1


def _signed(number: float, digits: int) -> str:
    text = f"{number:+.{digits}f}"
    return text[1:] if float(text) == 0 else text
