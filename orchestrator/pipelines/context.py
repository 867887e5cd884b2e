"""The context that every pipeline runs in, and the calls that plan and run at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from orchestrator.records.tracked_run import TrackedRun
from orchestrator.reporting.result import Result
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.journal import now_ms
from orchestrator.workspace.layout import Workspace, open_workspace

if TYPE_CHECKING:
    from orchestrator.tracking.tracker import Tracking

KEYWORD_ONLY = Parameter.KEYWORD_ONLY
Arguments = ParamSpec("Arguments")
Plan = TypeVar("Plan", bound=Result)
Outcome = TypeVar("Outcome")


class Context:
    """The workspace, a progress display and MLflow's store, passed from function to function."""

    def __init__(
        self,
        workspace: Workspace,
        progress: Progress | None = None,
        *,
        tracking: Tracking | None = None,
    ) -> None:
        """Name the workspace; the store is opened at first use unless `tracking` is given."""
        self.workspace = workspace
        self.progress = progress or Progress()
        self._tracking = tracking

    @property
    def tracking(self) -> Tracking:
        """MLflow's store; opening it takes seconds, so open it after arguments are checked.

        Raises:
            UserError: If MLflow does not know the store's address, or a local store is damaged.
        """
        if self._tracking is None:
            from orchestrator.tracking.tracker import open_tracking

            self._tracking = open_tracking(self.workspace, warn=self.progress.note)
        return self._tracking

    def log_measurement(self, measured: TrackedRun, started_ms: int) -> None:
        """Show a measurement in MLflow, if the workspace can be written.

        Args:
            started_ms: When it began; one that is found again keeps its times.
        """
        if self.workspace.is_writable:
            times: dict[str, int | None] = {"started_ms": started_ms, "ended_ms": now_ms()}
            stored = self.tracking.stored(measured.kind, measured.key)
            if stored:
                times = {"started_ms": stored.started_ms, "ended_ms": stored.ended_ms}
            self.tracking.publish(measured.changed(**times))
            self.tracking.wait()


def open_context(
    workspace: Workspace | Path | str | None, progress: Progress | None = None
) -> Context:
    """Open the workspace, or that of `find_workspace`; its folder is made if it is missing.

    Raises:
        UserError: If the folder cannot be used, see `open_workspace`.
    """
    if not isinstance(workspace, Workspace):
        workspace = open_workspace(Path(workspace) if workspace else None)
    return Context(workspace, progress)


def in_one_call(
    plan: Callable[Arguments, Plan],
    run: Callable[[Plan, Context], Outcome],
    **importers: Callable[[Any, Workspace | Path | str | None, Progress | None], Any],
) -> Callable[Arguments, Outcome]:
    """Return the function that takes what `plan` takes, and a progress display, and runs the plan.

    Its documentation is what `run` does, with the arguments and errors of `plan`.

    Args:
        plan: Takes `workspace`, and `progress` if there is something that it may say; writes
            nothing.
        importers: Name of an argument that may be a model of the hub -> function that imports it.
    """
    parameters = signature(plan).parameters
    plan_takes_progress = "progress" in parameters

    @wraps(plan)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Outcome:
        values: dict[str, Any] = options
        workspace = values.get("workspace")
        progress = values.get("progress")
        if not plan_takes_progress:
            values.pop("progress", None)
        for name, import_model in importers.items():
            values[name] = import_model(values.get(name), workspace, progress)
        planned = plan(*args, **options)
        planned.check()
        return run(planned, open_context(workspace, progress))

    # What `help` and editors show.
    call.__name__ = run.__name__.removeprefix("run_")
    call.__qualname__ = call.__name__
    summary = (run.__doc__ or "").partition("\n\n")[0]
    arguments_and_errors = (plan.__doc__ or "").partition("\n\n")[2]
    call.__doc__ = f"{summary}\n\n{arguments_and_errors}"
    shown_parameters = list(parameters.values())
    if not plan_takes_progress:
        progress_parameter = signature(open_context).parameters["progress"]
        shown_parameters.append(progress_parameter.replace(kind=KEYWORD_ONLY))
    call.__signature__ = Signature(  # type: ignore[attr-defined]
        shown_parameters, return_annotation=signature(run).return_annotation
    )
    return call
