"""Run the unfinished trials of a sweep with Ray Tune, then measure the times per token.

Results of finished trials are read once, at the start, so the same command resumes after any
interruption. The caller holds the lock of the sweep's folder, so one process runs a sweep.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from orchestrator.cluster.ray import ray_cluster
from orchestrator.records.status import FAILED_EVENT, STARTED_EVENT
from orchestrator.records.trial import SweepTrials
from orchestrator.reporting.costs import with_costs
from orchestrator.settings import SETTINGS_NAME, Settings, to_yaml
from orchestrator.sweeping.states import WAITING, RunningSweep, competing_trials, trial_states
from orchestrator.sweeping.trial import run_trial
from orchestrator.sweeping.view import SweepView
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import note_saved_state
from orchestrator.tracking.tracker import Tracking
from orchestrator.training.job import check_job
from orchestrator.workspace.errors import Interrupted, RunFailed
from orchestrator.workspace.files import write_text
from orchestrator.workspace.journal import record_event
from orchestrator.workspace.layout import PLAN_FILE, RAY_FOLDER, Workspace

if TYPE_CHECKING:
    from orchestrator.sweeping.search import ScheduleSearch


def run_trials(
    plan: SweepTrials,
    settings: Settings,
    workspace: Workspace,
    *,
    placed: Settings | None = None,
    tracking: Tracking,
    progress: Progress | None = None,
    search: ScheduleSearch | None = None,
) -> RunningSweep:
    """Run the unfinished trials of a plan, and measure the time per token of all models.

    Returns how each trial ended, and the results with their costs.

    Args:
        placed: The settings with the number of GPUs of each trial, if that differs.
        search: Suggests further trials when these have ended.

    Raises:
        UserError: If a training cannot run, for example if its workers cannot share a batch; or if
            there are too few CPUs or GPUs for one trial.
        Interrupted: After Ctrl-C; finished trials stay finished.
        RunFailed: If no trial could be finished, or one failed while it was stopping.
    """
    progress = progress or Progress()
    placed = placed or settings
    sweep = placed.sweep
    folder = workspace.sweeps / plan.name
    run = RunningSweep(plan, trial_states(plan, sweep), search)
    for state in run.with_status(*WAITING):
        if state.trial.job:
            check_job(state.trial.job, num_workers=sweep.num_workers_per_trial)

    # From here on `list` and `report` find the sweep.
    write_text(folder / SETTINGS_NAME, to_yaml(settings))
    record_event(folder, STARTED_EVENT)
    plan.write(folder / PLAN_FILE)
    with SweepView(run, settings, workspace, tracking, progress) as view:
        progress.start("sweep", run.num_all)
        view.update()  # Shows what earlier calls have finished.
        try:
            if not run.is_over:
                say = partial(progress.advance, run.num_ended)
                with ray_cluster(placed.cluster, folder=folder, say=say):
                    from orchestrator.cluster import tune  # Imports Ray, which reads what is set.

                    tune.run_queue(
                        run_trial,
                        run,
                        folder / RAY_FOLDER,
                        sweep,
                        placed.cluster,
                        num_trials=run.num_ready,
                        competitors=competing_trials(plan, sweep),
                        watch=view.update,
                    )
            if search:
                search.enter(run.results_by_key)  # Also results of earlier calls.
        except Interrupted:
            failed = [s for s in run.with_status("failed") if s.was_stopping]
            if not failed:
                raise
            reasons = [f"trial {state.trial.label} failed: {state.error}" for state in failed]
            error = RunFailed("; ".join(reasons))
            note_saved_state(error, run.saved())
            raise error from None
        finally:
            view.end_trials()
            if search:
                run.all_trials.write(folder / PLAN_FILE)
        progress.finish(run.summary())
        if run.failures:
            record_event(folder, FAILED_EVENT, trials=[*run.failures])
        finished = run.results_by_key
        results = [finished[t.key] for t in run.all_trials.trials if t.key in finished]
        if not results:
            reasons = [f"{label}: {reason}" for label, reason in run.failures.items()]
            raise RunFailed(
                f"no trial of the sweep {plan.name} could be finished: {'; '.join(reasons)}"
            )
        # Last, because running trials would distort the times.
        run.results = tuple(with_costs(results, plan, folder, settings, progress))
    return run
