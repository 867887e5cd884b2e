"""Text for the points of a front: names, qualities, costs, differences, confidences, verdicts."""

from __future__ import annotations

from orchestrator.reporting.front_axes import is_accuracy, metric_title
from orchestrator.reporting.pareto import Front, FrontPoint
from orchestrator.reporting.statistics import Interval
from orchestrator.terminal.render import format_schedule, format_with_error, scale_and_digits


def model_name(point: FrontPoint) -> str:
    """Return a model's label, or its schedule where the label says no more."""
    result = point.result
    if result.label and result.label != result.schedule_text:
        return result.label
    return format_schedule(result.schedule) or result.name


def full_name(front: Front, point: FrontPoint) -> str:
    """Return a model's name; with its sweep if another model on the front has the same name."""
    name = model_name(point)
    is_shared = front.sweep_of and sum(model_name(other) == name for other in front.points) > 1
    return f"{name} ({front.sweep_of[point.result.key]})" if is_shared else name


def quality_text(front: Front, point: FrontPoint) -> str:
    """Return a quality with its standard error, an accuracy in percent: `44.4 ± 1.2`."""
    return format_with_error(point.quality, point.error, is_percent=is_accuracy(front.axes.quality))


def difference_text(interval: Interval, *, is_percent: bool) -> str:
    """Return a difference with its interval: `-0.9 (-2.1 to +0.3)`, shares in points."""
    scale, digits = scale_and_digits(interval.value, is_percent=is_percent)

    def signed(number: float) -> str:
        text = f"{scale * number:+.{digits}f}"
        return text[1:] if float(text) == 0 else text

    return f"{signed(interval.value)} ({signed(interval.low)} to {signed(interval.high)})"


def range_text(interval: Interval, *, is_percent: bool) -> str:
    """Return the bounds of an interval: `31.2 to 36.1`."""
    scale, digits = scale_and_digits(interval.value, is_percent=is_percent)
    return f"{scale * interval.low:.{digits}f} to {scale * interval.high:.{digits}f}"


def cost_text(cost: float) -> str:
    """Return a cost with four digits, or all digits if it is in the thousands or millions."""
    return f"{cost:,.0f}" if 1000 <= cost < 1e7 else f"{cost:.4g}"


def confidence_text(share: float | None) -> str:
    """Return a confidence with two digits; never 0 or 1, which no number of draws can show."""
    if share is None:
        return ""
    if share > 0.99:
        return ">0.99"
    return "<0.01" if share < 0.01 else f"{share:.2f}"


def verdict(front: Front, point: FrontPoint) -> str:
    """Return a point's place: on the front, with its picks, or what a baseline beats."""
    if not point.is_candidate:
        num_beaten = len(front.members_beaten_by(point))
        return f"beats {num_beaten} ●" if num_beaten else ""
    if not point.on_front:
        return ""
    return " ".join(["●", *(name for name, pick in front.picks.items() if pick is point)])


def hypervolume_text(front: Front) -> str:
    """Return the hypervolume and the box that it is a share of; empty if there is none."""
    volume, box = front.hypervolume, front.hypervolume_box
    if volume is None or box is None:
        return ""
    quality, cost = metric_title(front.axes.quality).lower(), metric_title(front.axes.cost)
    is_percent = is_accuracy(front.axes.quality)
    unit = "%" if is_percent else ""
    low, high = (
        format_with_error(number, None, is_percent=is_percent) + unit
        for number in (box.quality, box.full_quality)
    )
    # Abbreviations such as FLOPs keep their capitals.
    cost = cost if cost[:2].isupper() else cost[0].lower() + cost[1:]
    return (
        f"hypervolume {volume:.3f}, as a share of the box from 0 to {cost_text(box.cost)} "
        f"({cost}) and from {quality} {low} to the full model's {high}"
    )
