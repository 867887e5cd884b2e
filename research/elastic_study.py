"""`python research/elastic_study.py`: one set of weights for all schedules, or a student for each?

For each teacher, of text (the shipped sweep `toy`) and of a task that needs depth (`depth`):

    teacher     one model with corrections
    elastic     elastic weights of several lengths of training, as multiples of a student's steps
    students    the separate student of each schedule; as the elastic weights under several seeds
    longer      the teacher itself, trained on without a teacher for as many steps

`results.md` compares them schedule by schedule, with paired intervals, and says whether the bars
are met that were fixed before (`BARS` and `MAX_FLOPS`); `trade-off.png` shows what longer elastic
training buys. Nothing is trained twice: the same command
resumes after an interruption. It takes hours on a CPU:

    python research/elastic_study.py --dry-run
    python research/elastic_study.py --teachers depth --times 1 2
    python research/elastic_study.py --set distillation.training.elastic.num_drawn=3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import altair

from orchestrator import (
    RunFailed,
    Settings,
    SweepResult,
    Trial,
    plan_pretrain,
    plan_sweep,
    prepare,
    pretrain,
    read_settings,
    report,
    sweep,
)  # fmt: skip
from orchestrator.cli.app import exit_code_of
from orchestrator.cli.session import Session, open_session
from orchestrator.cluster.ray import ray_cluster
from orchestrator.data.preparation import find_prepared
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.price import price_of
from orchestrator.records.metrics import metric_of
from orchestrator.reporting.front import Front
from orchestrator.reporting.output import show
from orchestrator.reporting.results import model_results
from orchestrator.reporting.sections import bullets, markdown_table
from orchestrator.reporting.statistics import INTERVAL_LEVEL
from orchestrator.reporting.tables import difference_text
from orchestrator.sweeping.students import student_estimate, without_elastic
from orchestrator.sweeping.sweep import raise_failures
from orchestrator.terminal.render import print_line
from orchestrator.training.job import finished_outcome, pretraining_job
from orchestrator.workspace.files import write_text

LOSS = "quality/validation_loss"
ACCURACY = "quality/accuracy"
MAX_FLOPS = 1 / 3
"""Largest share of the separate students' training FLOPs."""
EVERY_CORRECTION = 1e-30
"""A threshold below every influence."""


@dataclass(frozen=True)
class Bar:
    """How much worse than its separate student a schedule may be."""

    quality: str
    most: float
    schedules: tuple[tuple[int, ...], ...] = ()
    """Schedules that must meet it; all if empty."""


TEACHERS: Mapping[str, tuple[str, ...]] = {
    "text": ("toy",),
    # Thresholds drop all corrections of the second layer at once; budgets one by one.
    "depth": ("depth", "sweep.selection=knapsack", "sweep.budgets=[2, 3, 4, 5, 6, 7, 8]"),
}
"""Teacher -> its shipped sweep, and what is changed in it."""
BARS = {"text": Bar(LOSS, 0.003), "depth": Bar(ACCURACY, 0.02, ((0, 3), (0, 2)))}
FULL_BAR = {"text": Bar(LOSS, 0.003)}
"""How much worse than the teacher that was trained on the full schedule may be."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Elastic weights of one length of training, beside students and the longer teacher."""

    teacher: str
    times: float
    quality: str
    """Tracked name of the quality that rows compare."""
    rows: Sequence[Mapping[str, Any]]
    """The schedules, as `compare_schedules` returns them."""
    longer: Trial
    flops: tuple[float, float]
    """Training FLOPs of the elastic weights, and of the separate students."""

    @property
    def share(self) -> float:
        """Share of the separate students' FLOPs that the elastic weights take."""
        return self.flops[0] / self.flops[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or print its plan; return the exit code as `iiet-orch` does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, help="folder for all that is made")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--teachers", nargs="+", choices=[*TEACHERS], default=[*TEACHERS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument(
        "--times", type=float, nargs="+", default=[0.85, 2.0], metavar="X",
        help="lengths of the elastic training, as multiples of a student's steps",
    )  # fmt: skip
    parser.add_argument("--name", default="elastic-study", help="prefix of the sweeps' names")
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    options = parser.parse_args(arguments)

    try:
        usual = [f"sweep.seeds={options.seeds}", "sweep.elastic=true"]
        settings = {
            teacher: read_settings(file, [*changes, *usual, *options.changes])
            for teacher in options.teachers
            for file, *changes in [TEACHERS[teacher]]
        }
        is_dry = options.dry_run
        with open_session(
            options.workspace, "elastic-study", verbose=None, dry_run=is_dry
        ) as session:
            if is_dry:
                print_plans(settings, options.times, session)
            else:
                run_study(settings, options.times, session, options.name)
    except BaseException as error:
        return exit_code_of(error)
    return 0


def print_plans(settings: Mapping[str, Settings], times: Sequence[float], session: Session) -> None:
    """Print what is left of each teacher's training, or of its longest elastic sweep and its
    students."""
    workspace = session.workspace
    for teacher, own in settings.items():
        tokens = find_prepared(own.data, workspace.tokens)
        outcome = finished_outcome(pretraining_job(own, workspace, tokens))
        if outcome is None:
            show(plan_pretrain(own, workspace=workspace), session.console)
            steps = ", ".join(f"{_steps(own, factor):,}" for factor in times)
            print_line(session.console, f"  {teacher}: then elastic trainings of {steps} steps")
        else:
            for planned in (_of_length(own, max(times)), _separate_students(own)):
                plan = plan_sweep(planned, workspace=workspace, teacher=outcome.checkpoint)
                show(plan, session.console)


def run_study(
    settings: Mapping[str, Settings], times: Sequence[float], session: Session, name: str
) -> None:
    """Run what is not finished, and write the results after each length of training.

    Raises:
        RunFailed: If a trial failed; the same command tries it again.
    """
    folder = session.workspace.overlays / name
    readings = []
    cluster = next(iter(settings.values())).cluster
    with ray_cluster(cluster, folder=session.workspace.root, say=session.progress.start):
        for teacher, own in settings.items():
            for factor in times:
                readings.append(_reading(teacher, own, factor, session, name))
                write_text(folder / "results.md", study_markdown(readings))
                trade_off_chart(readings).save(folder / "trade-off.png", scale_factor=2)
                print_line(session.console, f"study: {folder / 'results.md'}")


def _reading(
    teacher: str, settings: Settings, factor: float, session: Session, name: str
) -> Reading:
    workspace = session.workspace
    progress = session.progress
    prepare(settings, workspace=workspace, progress=progress)
    checkpoint = pretrain(settings, workspace=workspace, progress=progress).checkpoint

    def run(own: Settings, what: str) -> SweepResult:
        found = sweep(
            own,
            workspace=workspace,
            teacher=checkpoint,
            name=f"{name}-{teacher}-{what}",
            progress=progress,
        )
        show(found, session.console)
        raise_failures(found.failures)
        return found

    own = _of_length(settings, factor)
    elastic = run(own, f"x{factor:g}")
    students = run(_separate_students(settings), "students")
    longer = run(_longer_teacher(own), f"longer-x{factor:g}")
    front = report(workspace=workspace, sweeps=[elastic.name, students.name]).front
    rows = compare_schedules(front)
    if not rows:
        names = f"{elastic.name} and {students.name}"
        raise RunFailed(f"the sweeps {names} have no schedule that was trained both ways")
    trials = [model.trial for model in model_results(longer.trials)]
    return Reading(
        teacher=teacher,
        times=factor,
        quality=front.axes.quality,
        rows=rows,
        longer=next(trial for trial in trials if trial.role == "trial"),
        flops=elastic_flops(own, [t for t in elastic.trials if t.is_elastic], workspace.root),
    )


def compare_schedules(front: Front) -> list[dict[str, Any]]:
    """Return a row for each schedule that was trained both ways, the costliest first.

    Elastic weights and students answered the same items, so their difference has a paired interval;
    it has none where values of single items are missing.
    """
    students = [
        model.trial for model in front.models if model.role == "trial" and model.trial.schedule
    ]
    elastic = {trial.schedule: trial for trial in students if trial.is_elastic}
    separate = {trial.schedule: trial for trial in students if not trial.is_elastic}
    scores = front.paired.quality(front.axes.quality) if front.paired else None
    places = front.paired.number_of if front.paired else {}
    rows = []
    shared = [schedule for schedule in elastic if schedule in separate]
    for schedule in sorted(shared, key=lambda s: (sum(s or ()), s), reverse=True):
        pair = elastic[schedule], separate[schedule]
        interval = None
        if scores and all(trial.key in places for trial in pair):
            difference = scores.difference(*(places[trial.key] for trial in pair))
            interval = difference.interval()
        rows.append(
            {
                "schedule": schedule,
                "evaluations": sum(pair[0].model.evaluations_per_layer()),
                "elastic": pair[0].value(front.axes.quality),
                "student": pair[1].value(front.axes.quality),
                "interval": interval,
                "elastic_loss": pair[0].value(LOSS),
                "student_loss": pair[1].value(LOSS),
            }
        )
    return rows


def elastic_flops(settings: Settings, trials: Sequence[Trial], folder: Path) -> tuple[float, float]:
    """Return the training FLOPs of elastic weights, and of separate students of their schedules;
    with what teachers compute, for all seeds.

    Args:
        trials: Those of elastic weights; at least one.
        folder: A folder on the workspace's disk.
    """
    jobs = [trial.job for trial in trials if trial.job]
    own = [replace(Estimate.of(job), steps_done=0) for job in jobs]
    recipe = without_elastic(settings.distillation).training
    separate = [
        student_estimate(
            settings.distillation,
            jobs[0].model,
            model,
            recipe.model_copy(update={"seed": job.recipe.seed}),
        )
        for job in jobs
        for model in {trial.model.corrections: trial.model for trial in trials}.values()
    ]
    return price_of(own, folder).flops, price_of(separate, folder).flops


def _steps(settings: Settings, factor: float) -> int:
    return round(factor * settings.distillation.training.num_steps)


def _of_length(settings: Settings, factor: float) -> Settings:
    own = settings.sweep.model_copy(update={"elastic_steps": _steps(settings, factor)})
    return settings.model_copy(update={"sweep": own})


def _separate_students(settings: Settings) -> Settings:
    """Return the sweep that distills a student for each schedule."""
    own = settings.sweep.model_copy(update={"elastic": False})
    students = without_elastic(settings.distillation)
    return settings.model_copy(update={"distillation": students, "sweep": own})


def _longer_teacher(settings: Settings) -> Settings:
    """Return the sweep that only trains the full schedule on, by cross-entropy."""
    changes = {
        "elastic": False,
        "selection": "threshold",
        "thresholds": (EVERY_CORRECTION,),
        "budgets": (),
    }
    recipe = settings.distillation.training.model_copy(
        update={"num_steps": settings.sweep.elastic_steps, "elastic": None}
    )
    control = {"control": "cross_entropy", "training": recipe}
    return settings.model_copy(
        update={
            "sweep": settings.sweep.model_copy(update=changes),
            "distillation": settings.distillation.model_copy(update=control),
        }
    )


def checks(reading: Reading) -> Iterator[tuple[str, float, float]]:
    """Yield each bar: what is compared, how much worse it is, and how much it may be."""
    bar = BARS[reading.teacher]
    for row in reading.rows:
        if not bar.schedules or tuple(row["schedule"]) in bar.schedules:
            yield f"({_text(row)}) against its student", _shortfall(bar.quality, row), bar.most
    if full := FULL_BAR.get(reading.teacher):
        longer = reading.longer.numbers
        loss = longer.get(LOSS)
        accuracy = longer.get(ACCURACY)
        against = {**reading.rows[0], "student_loss": loss, "student": accuracy}
        shortfall = _shortfall(full.quality, against)
        yield "the full schedule against the teacher trained on", shortfall, full.most
    yield "share of the separate students' training FLOPs", reading.share, MAX_FLOPS


def trade_off_chart(readings: Sequence[Reading]) -> Any:
    """Return what a longer elastic training buys, schedule by schedule: a panel per teacher.

    Dashed lines are the bars: the study asks for points below and left of them.
    """
    panels = []
    for teacher in dict.fromkeys(reading.teacher for reading in readings):
        bar = BARS[teacher]
        scale = 1000 if bar.quality == LOSS else 100
        unit = "loss, 0.001 nats" if bar.quality == LOSS else "accuracy, points"
        points = [
            {
                "schedule": _text(row),
                "share": 100 * reading.share,
                "worse": scale * _shortfall(bar.quality, row),
            }
            for reading in readings
            if reading.teacher == teacher
            for row in reading.rows
        ]
        lines = altair.Chart(altair.InlineData(values=points), title=teacher).mark_line(point=True)
        lines = lines.encode(
            x=altair.X("share:Q", title="training FLOPs, % of the separate students'"),
            y=altair.Y("worse:Q", title=f"worse than the separate student ({unit})"),
            color=altair.Color("schedule:N", scale=altair.Scale(scheme="viridis"), sort=None),
        )
        most = altair.InlineData(values=[{"share": 100 * MAX_FLOPS, "worse": scale * bar.most}])
        bars = altair.Chart(most).mark_rule(strokeDash=[6, 4], color="gray")
        panels.append(altair.layer(lines, bars.encode(x="share:Q"), bars.encode(y="worse:Q")))
    return altair.hconcat(*panels).resolve_scale(color="independent")


def _text(row: Mapping[str, Any]) -> str:
    return ",".join(map(str, row["schedule"]))


def _shortfall(quality: str, row: Mapping[str, Any]) -> float:
    if quality == LOSS:
        return float(row["elastic_loss"] - row["student_loss"])
    return float(row["student"] - row["elastic"])


def comparison_table(reading: Reading) -> str:
    """Return the table of the schedules, and a sentence on what it compares."""
    metric = metric_of(reading.quality)
    name = metric.title.lower()

    def quality_text(value: float | None) -> str:
        if value is None:
            return ""
        return f"{100 * value:.1f}%" if metric.is_percent else f"{value:.4f}"

    rows = []
    for row in reading.rows:
        interval = row["interval"]
        losses = (row["elastic_loss"], row["student_loss"])
        rows.append(
            (
                _text(row),
                str(row["evaluations"]),
                quality_text(row["elastic"]),
                quality_text(row["student"]),
                difference_text(interval, is_percent=metric.is_percent) if interval else "",
                *("" if loss is None else f"{loss:.4f}" for loss in losses),
            )
        )
    header = (
        *("schedule", "NFE", "elastic", "separate", f"difference in {name}"),
        *("elastic loss", "separate loss"),
    )
    sentence = (
        f"Quality is {name}; the difference is that of the elastic weights minus that of the "
        f"student of the same schedule, with its {INTERVAL_LEVEL:.0%} interval over the items that "
        "both answered. Losses are in nats per token of the validation text."
    )
    return f"{sentence}\n\n{markdown_table(header, rows)}"


def study_markdown(readings: Sequence[Reading]) -> str:
    """Return the page of results."""
    parts = ["# Elastic weights against separate students"]
    for reading in readings:
        found = list(checks(reading))
        rows = [
            (name, f"{value:.4f}", f"{most:.4f}", "yes" if value <= most else "no")
            for name, value, most in found
        ]
        longer = reading.longer
        full = [f"{metric.partition('/')[2]} {longer.value(metric):.4f}"
                for metric in (LOSS, ACCURACY) if longer.value(metric) is not None]  # fmt: skip
        parts += [
            f"## {reading.teacher}, elastic training of {reading.times:g} times a student's steps",
            comparison_table(reading),
            bullets([f"The teacher, trained on for as many steps: {', '.join(full)}."]),
            markdown_table(("bar", "worse by", "at most", "met"), rows),
        ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
