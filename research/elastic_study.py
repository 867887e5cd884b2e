"""`python research/elastic_study.py`: one set of weights for all schedules, or a student for each?

For each teacher, of text (the shipped sweep `toy`) and of a task that needs depth (`depth`):

    teacher     one model with corrections
    elastic     elastic weights of several lengths of training, as multiples of a student's steps,
                and once the separate student of each schedule; both under several seeds
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
    sweep,
)  # fmt: skip
from orchestrator.cli.app import exit_code_of
from orchestrator.cli.session import Session, open_session
from orchestrator.cluster.ray import ray_cluster
from orchestrator.data.preparation import find_prepared
from orchestrator.pipelines.result import show
from orchestrator.pipelines.sweeps import raise_failures
from orchestrator.planning.estimate import Estimate, price_of
from orchestrator.reporting.results import result_table
from orchestrator.reporting.sections import Section, bullets, markdown_table
from orchestrator.sweeping.students import student_estimate, without_elastic
from orchestrator.terminal.render import print_line
from orchestrator.training.job import finished_outcome, pretraining_job
from orchestrator.workspace.files import write_text

LOSS, ACCURACY = "quality/validation_loss", "quality/accuracy"
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
    section: Section
    longer: Trial
    flops: tuple[float, float]
    """Training FLOPs of the elastic weights, and of the separate students."""

    @property
    def share(self) -> float:
        """Share of the separate students' FLOPs that the elastic weights take."""
        return self.flops[0] / self.flops[1]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The schedules that were trained both ways, the costliest first."""
        rows: list[dict[str, Any]] = self.section.data["elastic"]["schedules"]
        return rows


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
        usual = [f"sweep.seeds={options.seeds}", "sweep.elastic=true", "sweep.compare=true"]
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
    """Print what is left of each teacher's training, or of its longest elastic sweep."""
    workspace = session.workspace
    for teacher, own in settings.items():
        tokens = find_prepared(own.data, workspace.tokens)
        outcome = finished_outcome(pretraining_job(own, workspace, tokens))
        if outcome is None:
            show(plan_pretrain(own, workspace=workspace), session.console)
            steps = ", ".join(f"{_steps(own, factor):,}" for factor in times)
            print_line(session.console, f"  {teacher}: then elastic trainings of {steps} steps")
        else:
            longest = _of_length(own, max(times))
            plan = plan_sweep(longest, workspace=workspace, teacher=outcome.checkpoint)
            show(plan, session.console)


def run_study(
    settings: Mapping[str, Settings], times: Sequence[float], session: Session, name: str
) -> None:
    """Run what is not finished, and write the results after each length of training.

    Raises:
        RunFailed: If a trial failed; the same command tries it again.
    """
    folder, readings = session.workspace.overlays / name, []
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
    workspace, progress = session.workspace, session.progress
    prepare(settings, workspace=workspace, progress=progress)
    checkpoint = pretrain(settings, workspace=workspace, progress=progress).checkpoint

    def run(own: Settings, what: str) -> SweepResult:
        found = sweep(
            own,
            workspace=workspace,
            teacher=checkpoint,
            baselines={},
            name=f"{name}-{teacher}-{what}",
            progress=progress,
        )
        show(found, session.console)
        raise_failures(found.failures)
        return found

    own = _of_length(settings, factor)
    both = run(own, f"x{factor:g}")
    longer = run(_longer_teacher(own), f"longer-x{factor:g}")
    section = both.elastic
    if section is None:
        raise RunFailed(f"the sweep {both.name} has no schedule that was trained both ways")
    trials = result_table(longer.trials)["trial"]
    return Reading(
        teacher=teacher,
        times=factor,
        section=section,
        longer=next(trial for trial in trials if trial.role == "trial"),
        flops=elastic_flops(own, [t for t in both.trials if t.is_elastic], workspace.root),
    )


def elastic_flops(settings: Settings, trials: Sequence[Trial], folder: Path) -> tuple[float, float]:
    """Return the training FLOPs of elastic weights, and of separate students of their schedules;
    with what teachers compute, for all seeds.

    Args:
        trials: Those of elastic weights; at least one.
        folder: A folder on the workspace's disk.
    """
    jobs = [trial.job for trial in trials if trial.job]
    own = [replace(Estimate.of(job), steps_done=0) for job in jobs]
    recipe = without_elastic(settings).distillation.training
    separate = [
        student_estimate(
            settings, jobs[0].model, model, recipe.model_copy(update={"seed": job.recipe.seed})
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


def _longer_teacher(settings: Settings) -> Settings:
    """Return the sweep that only trains the full schedule on, by cross-entropy."""
    changes = {
        **{"elastic": False, "compare": False},
        **{"selection": "threshold", "thresholds": (EVERY_CORRECTION,), "budgets": ()},
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
        loss, accuracy = longer.get(LOSS), longer.get(ACCURACY)
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


def study_markdown(readings: Sequence[Reading]) -> str:
    """Return the page of results."""
    parts = ["# Elastic weights against separate students"]
    for reading in readings:
        found = list(checks(reading))
        rows = [
            (name, f"{value:.4f}", f"{most:.4f}", "yes" if value <= most else "no")
            for name, value, most in found
        ]
        longer, section = reading.longer, reading.section
        full = [f"{metric.partition('/')[2]} {longer.value(metric):.4f}"
                for metric in (LOSS, ACCURACY) if longer.value(metric) is not None]  # fmt: skip
        parts += [
            f"## {reading.teacher}, elastic training of {reading.times:g} times a student's steps",
            section.sentences[0],
            section.tables[0].to_markdown(),
            bullets(section.notes),
            bullets([f"The teacher, trained on for as many steps: {', '.join(full)}."]),
            markdown_table(("bar", "worse by", "at most", "met"), rows),
        ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
