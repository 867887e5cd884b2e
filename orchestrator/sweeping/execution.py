"""Stage `sweep`: the trials of a plan under Ray Tune, each once, then their time per token.

Out come the results; the sweep's folder holds its plan and settings. Finished trials are found by
their keys and not run again, so the same command after any interruption goes on. After each
trial the sweep's run is told how far the front has come. Milliseconds are measured last, in this
process, all models taking turns, because trials that run side by side disturb each other's clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from iiet.cost import inference_cost
from iiet.decoder import Decoder
from orchestrator.cluster.placement import check_trial_size
from orchestrator.cluster.start import ray_cluster
from orchestrator.data.token_store import open_tokens
from orchestrator.evaluation.decode_timing import SWEEP_NEW_TOKENS, time_per_token
from orchestrator.planning.feasibility import check_trials_fit
from orchestrator.planning.fit import request_of
from orchestrator.planning.trial_gpus import assign_trial_gpus
from orchestrator.records.trial import TrialResult
from orchestrator.reporting.training_curves import history_folder
from orchestrator.settings import Settings, flatten, to_yaml
from orchestrator.sweeping.asha import EarlyStop, EarlyStopping, early_stopping_of
from orchestrator.sweeping.front_history import record_front
from orchestrator.sweeping.remaining_cost import plan_record
from orchestrator.sweeping.trial_queue import TrialQueue
from orchestrator.sweeping.trials import PlannedTrial, SweepPlan, exact_cost, full_config
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import TrackedRun, Tracking, status_after
from orchestrator.training.job import DONE_NAME, TrainingJob, check_job, finished_outcome
from orchestrator.training.teacher_cache_policy import (
    delete_teacher_caches,
    estimate_teacher_work,
    store_teacher_outputs,
)
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import read_cached, read_json_object, write_json, write_text
from orchestrator.workspace.folders import Workspace
from orchestrator.workspace.provenance import content_key, environment

NextTrials = Callable[[], Sequence[PlannedTrial]]
"""Returns the trials to run next, none at the end."""

PLAN_NAME = "plan.json"
STOPPED_TAG = "iiet.stopped_early"
TIMES_NAME = "times.json"


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """What a sweep has come to."""

    plan: SweepPlan
    """The trials, those that a search found among them."""
    folder: Path
    """The sweep's folder."""
    results: tuple[TrialResult, ...]
    """Finished trials, the teacher and the baselines among them, in the plan's order."""
    failures: dict[str, str]
    """Label -> reason of trials that failed for good."""
    stopped: dict[str, str]
    """Label -> reason of trials that were ended by a rule before their training was."""
    reused: frozenset[str]
    """Keys of the trials that this call found finished: from before, or by another sweep."""


def run_sweep(
    plan: SweepPlan,
    settings: Settings,
    workspace: Workspace,
    *,
    tracking: Tracking,
    progress: Progress | None = None,
    next_trials: NextTrials | None = None,
) -> SweepOutcome:
    """Run what is not finished of a plan, measure the time per token, and write down the results.

    Args:
        plan: The trials.
        settings: Section `sweep` says how many run at once and how often one may fail.
        workspace: Where trials and the sweep live.
        tracking: Where the runs are shown.
        progress: Told what is going on.
        next_trials: Called when all trials have ended; those that it returns are run next, until it
            returns none. For searches, which choose by what they have seen.

    Raises:
        UserError: If one trial has no room, or a batch cannot be shared by its workers.
        Interrupted: After Ctrl-C; finished trials stay finished.
        RunFailed: If no trial at all could be finished.
    """
    progress = progress or Progress()
    placed = _placed(plan.trials, settings, workspace)
    folder = workspace.sweeps / plan.name
    try:
        earlier = read_json_object(folder / PLAN_NAME, remedy="it is written anew") or {}
    except UserError as error:
        progress.note(str(error))
        earlier = {}
    if earlier.get("key", plan.key) != plan.key:
        progress.note(
            f"the sweep {plan.name} had another plan before; its front is replaced by this one's, "
            "its trials stay"
        )
    write_text(folder / "settings.yaml", to_yaml(settings))
    with _tracked_sweep(plan, settings, tracking) as run, ExitStack() as held:
        work = _Work(plan, placed, workspace, run, progress)
        work.do(plan.trials)
        while more := tuple(next_trials()) if next_trials else ():
            _placed(more, placed, workspace)
            work.plan = replace(work.plan, trials=(*work.plan.trials, *more))
            if any(trial.result() is None for trial in more):
                # Started once for all rounds of a search.
                held.enter_context(ray_cluster(say=progress.start))
            work.do(more)
        plan = work.plan
        work.delete_teacher_caches()
        verdicts = {t.label: v for t in plan.trials if (v := work.stopping.verdict_of(t))}
        _tell_stopped(run, verdicts, len(plan.trials))
        found = _finished(plan, work.failures)
        results = _with_costs(found, plan, folder, progress)
    return SweepOutcome(
        plan=plan,
        folder=folder,
        results=tuple(results),
        failures=work.failures,
        stopped={label: verdict.text for label, verdict in verdicts.items()},
        reused=frozenset(trial.key for trial, _ in found) - work.made,
    )


@dataclass
class _Work:
    """The trials of a sweep, run part by part, and how they ended."""

    plan: SweepPlan
    settings: Settings
    workspace: Workspace
    run: TrackedRun
    progress: Progress
    failures: dict[str, str] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    stopping: EarlyStopping = field(default_factory=EarlyStopping)
    _jobs: list[TrainingJob] = field(default_factory=list)
    _stored: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.workspace.sweeps / self.plan.name

    def do(self, trials: Sequence[PlannedTrial]) -> None:
        """Run what is not finished of some of the plan's trials."""
        # The price is that of the start: it reads checkpoints, and measures this machine.
        first = self._stored or plan_record(self.plan, self.settings, self.workspace.teachers)
        self._stored = first | self.plan.to_dict()
        write_json(self.folder / PLAN_NAME, self._stored)
        self._tell_front()
        self.stopping = early_stopping_of(self.plan, self.settings.sweep)
        lost = {trial.key for trial in trials if self.stopping.verdict_of(trial)}
        waiting = [t for t in trials if t.result() is None and t.key not in lost]
        waiting = self._with_shared_teacher(waiting)
        self._jobs += [TrainingJob.from_dict(trial.job) for trial in waiting if trial.job]
        rounds = TrialQueue(
            self.folder,
            self.settings.sweep,
            self.progress,
            num_all=len(trials),
            stopping=self.stopping,
            lost=lost,
            on_end=self._tell_front,
        )
        rounds.run(waiting)
        self.failures |= rounds.failures
        self.made |= rounds.made

    def _with_shared_teacher(self, waiting: Sequence[PlannedTrial]) -> list[PlannedTrial]:
        """Run the teacher once for all students where that pays, and tell them where to look."""
        jobs = {trial.key: TrainingJob.from_dict(trial.job) for trial in waiting if trial.job}
        # Those that are only measured do not ask it.
        jobs = {key: job for key, job in jobs.items() if finished_outcome(job) is None}
        asked = list(jobs.values())
        distillation, teachers = self.settings.distillation, self.workspace.teachers
        num_tokens = estimate_teacher_work(asked, distillation, teachers).num_stored_tokens
        shared = store_teacher_outputs(
            asked,
            distillation,
            teachers,
            on_gpu=self.settings.trials_use_gpus,
            progress=self.progress,
        )
        if num_tokens:
            # A teacher that runs in each trial is in the trials' own FLOPs.
            forward = inference_cost(full_config(self.plan)).forward_flops_per_token
            numbers = {"teacher_tokens": num_tokens, "teacher_flops": num_tokens * forward}
            named = {f"sweep/{name}": float(number) for name, number in numbers.items()}
            self.run.log_metrics(named, step=len(self.plan.trials))
        jobs = dict(zip(jobs, shared, strict=True))
        return [replace(t, job=jobs[t.key].to_dict()) if t.key in jobs else t for t in waiting]

    def delete_teacher_caches(self) -> None:
        """Delete what was stored of the teacher, unless a failed student will ask for it again."""
        if not self.failures:
            delete_teacher_caches(self._jobs, self.settings.distillation)

    def _tell_front(self) -> None:
        history = history_folder(self.folder, self.plan.key)
        if record_front(self.plan, history):
            self.run.log_journal(history)


def _placed(trials: Sequence[PlannedTrial], settings: Settings, workspace: Workspace) -> Settings:
    """Say on what trials run, and find before anything is started what would make them fail."""
    waiting = [
        TrainingJob.from_dict(trial.job) for trial in trials if trial.job and not trial.result()
    ]
    settings = assign_trial_gpus(settings, [request_of(job) for job in waiting])
    num_workers = check_trial_size(settings.sweep)
    for job in waiting:
        check_job(job, num_workers=num_workers)
    to_train = [job for job in waiting if not (job.folder / DONE_NAME).is_file()]
    answers = estimate_teacher_work(to_train, settings.distillation, workspace.teachers).num_bytes
    check_trials_fit(waiting, settings.sweep, teacher_bytes=answers)
    return settings


def _finished(
    plan: SweepPlan, failures: Mapping[str, str]
) -> list[tuple[PlannedTrial, TrialResult]]:
    found = [(trial, result) for trial in plan.trials if (result := trial.result())]
    if not found:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in failures.items())
        raise RunFailed(f"no trial of the sweep {plan.name} could be finished: {reasons}")
    return found


def _tell_stopped(run: TrackedRun, verdicts: Mapping[str, EarlyStop], num_trials: int) -> None:
    if verdicts:
        saved = sum(verdict.share_saved for verdict in verdicts.values())
        run.log_metrics({"sweep/trainings_saved": saved}, step=num_trials)
        told = "; ".join(f"{label} {verdict.text}" for label, verdict in verdicts.items())
        run.set_tags({STOPPED_TAG: told})


@contextmanager
def _tracked_sweep(plan: SweepPlan, settings: Settings, tracking: Tracking) -> Iterator[TrackedRun]:
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
        yield run
    except BaseException as error:
        run.finish(status_after(error))
        raise
    run.finish()


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
    state = content_key(sorted(set(shapes.values())), environment(), SWEEP_NEW_TOKENS)
    path = folder / TIMES_NAME

    def parse(found: dict[str, Any]) -> dict[str, dict[str, float]] | None:
        if found.get("state") != state:
            return None
        return {trial.key: found["milliseconds"][shapes[trial.key]] for trial in trials}

    if (known := read_cached(path, parse, progress.note)) is not None:
        return known
    decoders = {shapes[trial.key]: Decoder(trial.config()) for trial in trials}
    timings = time_per_token(decoders, progress)
    milliseconds = {
        shape: {"decode_ms_per_token": t.median, "decode_ms_spread": t.spread}
        for shape, t in timings.items()
    }
    write_json(path, {"state": state, "milliseconds": milliseconds})
    return {trial.key: milliseconds[shapes[trial.key]] for trial in trials}
