"""Section of a report: elastic weights against separate students, schedule by schedule.

Both answered the same items, so their difference has a paired interval. Where single items are
missing, the difference stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.trial import LOSS
from orchestrator.reporting.front import Front, evaluations, is_accuracy, metric_title
from orchestrator.reporting.sections import Column, Section, Table, TableRow
from orchestrator.reporting.statistics import INTERVAL_LEVEL, pair_scores

ELASTIC_TITLE = "Elastic weights against separate students"


def elastic_section(front: Front, items: Mapping[str, EvaluationResult]) -> Section | None:
    """Return the section; None if no schedule was trained both ways.

    Args:
        front: The models with their seeds; its quality is compared.
        items: Key of a result -> its evaluation with the values of single items.
    """
    own = [r for r in front.trials if r.role == "trial" and r.parent and r.schedule is not None]
    elastic = {r.schedule: r for r in own if r.is_elastic}
    # The controls are not students that a teacher has taught.
    students = {r.schedule: r for r in own if r.job and r.job.teacher_folder and not r.is_elastic}
    shared = [schedule for schedule in elastic if schedule in students]
    if not shared:
        return None
    quality, found = front.axes.quality, evaluations(front.table, items)
    name, is_percent = metric_title(quality).lower(), is_accuracy(quality)
    scale, digits, unit = (100, 1, "%") if is_percent else (1, 3, "")
    rows, data = [], []
    for schedule in sorted(shared, key=lambda s: (sum(s or ()), s), reverse=True):
        pair = (elastic[schedule], students[schedule])
        (first, second), losses = ([m.value(n) for m in pair] for n in (quality, LOSS))
        interval, difference = None, ""
        if all(model.key in found for model in pair):
            paired = pair_scores({model.key: found[model.key] for model in pair})
            scores = paired and paired.quality(quality)
            interval = scores.difference(0, 1) if scores else None
        if interval:
            ends = (interval.value, interval.low, interval.high)
            value, low, high = (f"{scale * end:+.{digits}f}" for end in ends)
            difference = f"{value} ({low} to {high})"
        elif first is not None and second is not None:
            difference = f"{scale * (first - second):+.{digits}f}"
        cells = (
            pair[0].schedule_text,
            f"{sum(pair[0].model.evaluations_per_layer())}",
            *("" if q is None else f"{scale * q:.{digits}f}{unit}" for q in (first, second)),
            difference,
            *("" if loss is None else f"{loss:.4f}" for loss in losses),
        )
        rows.append(TableRow(cells))
        data.append(
            {
                "schedule": list(schedule or ()),
                "elastic": first,
                "student": second,
                "difference": interval and interval.value,
                "interval": interval and [interval.low, interval.high],
                "elastic_loss": losses[0],
                "student_loss": losses[1],
            }
        )

    trained = [seed for seeds in front.table["seeds"] for seed in seeds]
    trained = [r for r in trained if r.job and r.role == "trial" and r.schedule in shared]
    spent = [
        [r.numbers.get("train/flops", 0.0) for r in trained if r.is_elastic == is_elastic]
        for is_elastic in (True, False)
    ]
    flops = [sum(of_kind) for of_kind in spent] if all(of and all(of) for of in spent) else None
    columns = (
        *(Column("schedule", is_text=True), Column("NFE"), Column("elastic"), Column("separate")),
        *(Column(f"difference in {name}"), Column("elastic loss", 1), Column("separate loss", 2)),
    )
    return Section(
        title=ELASTIC_TITLE,
        sentences=[
            f"Quality is {name}; the difference is that of the elastic weights minus that of the "
            f"student of the same schedule, with the range of {INTERVAL_LEVEL:.0%} of draws of the "
            "items that both answered. Losses are in nats per token of the validation text."
        ],
        tables=[Table(columns, rows)],
        notes=[
            f"Training took {flops[0]:.3g} FLOPs for the elastic weights, "
            f"{flops[0] / flops[1]:.0%} of the {flops[1]:.3g} for the separate students. "
            "Outputs of the teacher that were stored for all students are not counted."
        ]
        if flops
        else [],
        data={"elastic": {"quality": quality, "schedules": data, "training_flops": flops}},
    )
