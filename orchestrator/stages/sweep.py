"""Stage `sweep`: the trials of a plan under Ray Tune, each once, then their time per token.

Out come the results; the sweep's folder holds its plan and settings. Finished trials are found by
their keys and not run again, so the same command after any interruption goes on. Milliseconds are
measured last, in this process, all models taking turns, because trials that run side by side
disturb each other's clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iiet.cost import inference_cost
from iiet.decoder import Decoder
from orchestrator.analysis.benchmark import decode_milliseconds, threads
from orchestrator.console import Progress
from orchestrator.data.tokens import open_tokens
from orchestrator.errors import StageFailed
from orchestrator.follow import JournalTail
from orchestrator.plan import PlannedTrial, SweepPlan, exact_cost, full_config
from orchestrator.provenance import content_key, environment
from orchestrator.settings import Settings, flatten, to_yaml
from orchestrator.tracking import Tracking, status_after
from orchestrator.training.job import TrainingJob
from orchestrator.training.teacher_choice import share_teacher
from orchestrator.trial import TrialResult
from orchestrator.trial_run import run_trial
from orchestrator.trial_runner import TrialContext, TrialLimits, TrialReport, run_trials
from orchestrator.workspace import Workspace, read_json, write_json, write_text

PLAN_NAME = "plan.json"
TIMES_NAME = "times.json"
PROMPT_TOKENS = 16
NEW_TOKENS = 32
REPETITIONS = 5


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """What a sweep has come to."""

    folder: Path
    """The sweep's folder."""
    results: tuple[TrialResult, ...]
    """Finished trials, the teacher and the references among them, in the plan's order."""
    failures: dict[str, str]
    """Label -> reason of trials that failed for good."""
    reused: frozenset[str]
    """Keys of the trials that were finished before this call."""


def sweep(
    plan: SweepPlan,
    settings: Settings,
    workspace: Workspace,
    *,
    tracking: Tracking,
    progress: Progress | None = None,
) -> SweepOutcome:
    """Run what is not finished of a plan, measure the time per token, and write down the results.

    Args:
        plan: The trials.
        settings: Section `sweep` says how many run at once and how often one may fail.
        workspace: Where trials and the sweep live.
        tracking: Where the runs are shown.
        progress: Told what is going on.

    Raises:
        Interrupted: After Ctrl-C; finished trials stay finished.
        StageFailed: If no trial at all could be finished.
    """
    progress = progress or Progress()
    folder = workspace.sweeps / plan.name
    write_json(folder / PLAN_NAME, plan.to_dict())
    write_text(folder / "settings.yaml", to_yaml(settings))
    with _tracked_sweep(plan, settings, tracking):
        waiting = [trial for trial in plan.trials if trial.result() is None]
        waiting = _with_shared_teacher(waiting, settings, workspace, progress)
        failures = _run_waiting(waiting, plan, settings, folder, progress)
        found = [(trial, result) for trial in plan.trials if (result := trial.result())]
        if not found:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in failures.items())
            raise StageFailed(f"no trial of the sweep {plan.name} could be finished: {reasons}")
        results = _with_costs(found, plan, folder, progress)
    return SweepOutcome(
        folder=folder,
        results=tuple(results),
        failures=failures,
        reused=frozenset(t.key for t in plan.trials) - {t.key for t in waiting},
    )


@contextmanager
def _tracked_sweep(plan: SweepPlan, settings: Settings, tracking: Tracking) -> Iterator[None]:
    """Keep the sweep's run in step with how the block ends; the report nests the trials in it."""
    params = {
        "kind": plan.kind,
        "teacher": plan.teacher or "",
        "num_trials": len(plan.trials),
        **flatten(settings),
    }
    run = tracking.run(
        plan.key, name=plan.name, kind="sweep", params=params, tags={"iiet.sweep": plan.name}
    )
    tokens = open_tokens(plan.tokens_folder)
    run.log_dataset("tokens", tokens.fingerprint, tokens.profile)
    try:
        yield
    except BaseException as error:
        run.finish(status_after(error))
        raise
    run.finish()


def _with_shared_teacher(
    waiting: Sequence[PlannedTrial], settings: Settings, workspace: Workspace, progress: Progress
) -> list[PlannedTrial]:
    """Run the teacher once for all students where that pays, and tell them where to look."""
    jobs = {trial.key: TrainingJob.from_dict(trial.job) for trial in waiting if trial.job}
    shared = share_teacher(
        list(jobs.values()), settings.distillation, workspace.teachers, progress=progress
    )
    jobs = dict(zip(jobs, shared, strict=True))
    return [replace(t, job=jobs[t.key].to_dict()) if t.job else t for t in waiting]


def _run_waiting(
    waiting: Sequence[PlannedTrial],
    plan: SweepPlan,
    settings: Settings,
    folder: Path,
    progress: Progress,
) -> dict[str, str]:
    """Run trials and return the reasons of those that failed."""
    num_all = len(plan.trials)
    progress.start("sweep", num_all)
    num_done = num_all - len(waiting)
    failures: dict[str, str] = {}
    if waiting:
        tails = {trial.key: JournalTail(Path(trial.folder)) for trial in waiting}

        def on_result(report: TrialReport) -> None:
            label = report.parameters["label"]
            if report.error:
                failures[label] = report.error
                progress.note(f"trial {label} failed: {report.error}")

        def watch() -> None:
            shares = [_share_done(trial, tails[trial.key]) for trial in waiting]
            running = [t.label for t, share in zip(waiting, shares, strict=True) if 0 < share < 1]
            progress.advance(num_done + sum(shares), " ".join(running[:3]))

        run_trials(
            trial_function,
            # The costly ones first, so that none runs alone at the end.
            [t.to_dict() for t in sorted(waiting, key=_expected_work, reverse=True)],
            folder,
            limits=TrialLimits(
                at_once=settings.sweep.trials_at_once,
                max_failures=settings.sweep.max_failures_per_trial,
            ),
            on_result=on_result,
            watch=watch,
        )
    failed = f", {len(failures)} failed" if failures else ""
    reused = f", {num_done} of them found finished" if num_done else ""
    progress.finish(f"{num_all} trials{reused}{failed}")
    return failures


def trial_function(parameters: dict[str, Any], context: TrialContext) -> dict[str, Any]:
    """Run one trial in a Ray worker; what Tune is given."""
    result = run_trial(parameters, should_stop=context.should_stop)
    return result.to_dict() if result else {}


def _expected_work(trial: PlannedTrial) -> float:
    evaluations = inference_cost(trial.config()).evaluations_per_token
    return evaluations * (3.0 if trial.job else 1.0)


def _share_done(trial: PlannedTrial, tail: JournalTail) -> float:
    """Tell how far a trial is, from its files: training counts nine tenths, measuring the rest."""
    if trial.result_path.exists():
        return 1.0
    if not trial.job:
        return 0.0
    tail.read()
    return 0.9 * tail.step / int(trial.job["recipe"]["num_steps"])


def _with_costs(
    found: Sequence[tuple[PlannedTrial, TrialResult]],
    plan: SweepPlan,
    folder: Path,
    progress: Progress,
) -> list[TrialResult]:
    """Add what each model costs: exact counts, and measured milliseconds."""
    full = full_config(plan)
    times = _decode_times([trial for trial, _ in found], folder, progress)
    return [
        replace(result, cost={**exact_cost(trial.config(), full), **times[trial.key]})
        for trial, result in found
    ]


def _decode_times(
    trials: Sequence[PlannedTrial], folder: Path, progress: Progress
) -> dict[str, dict[str, float]]:
    """Measure decoding once a sweep and machine; the values of the weights have no say in it."""
    shapes = {trial.key: content_key(trial.model) for trial in trials}
    state = content_key(sorted(set(shapes.values())), environment(), NEW_TOKENS)
    known = read_json(folder / TIMES_NAME) or {}
    if known.get("state") != state:
        decoders = {shapes[trial.key]: Decoder(trial.config()) for trial in trials}
        progress.start("time per token", len(decoders) * REPETITIONS)
        # One row at a time is too little work to share: more threads only wait for each other.
        with threads(1):
            timings = decode_milliseconds(
                decoders,
                prompt_tokens=PROMPT_TOKENS,
                new_tokens=NEW_TOKENS,
                batch_size=1,
                repetitions=REPETITIONS,
                on_done=lambda done, _: progress.advance(done),
            )
        milliseconds = {
            shape: {"decode_ms_per_token": t.median, "decode_ms_spread": t.spread}
            for shape, t in timings.items()
        }
        known = {"state": state, "milliseconds": milliseconds}
        write_json(folder / TIMES_NAME, known)
        slowest = max(t.median for t in timings.values())
        progress.finish(f"{len(decoders)} models, the slowest {slowest:.1f} ms")
    return {trial.key: known["milliseconds"][shapes[trial.key]] for trial in trials}
