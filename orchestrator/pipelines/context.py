"""The context that every pipeline runs in, and the calls that plan and run at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from orchestrator.records.tracked_run import TrackedRun
from orchestrator.reporting.result import Result
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.journal import now_ms
from orchestrator.workspace.layout import Workspace, open_workspace

if TYPE_CHECKING:
    from orchestrator.tracking.tracker import Tracking

Asked = ParamSpec("Asked")
Planned = TypeVar("Planned", bound=Result)
Made = TypeVar("Made")


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
            known = self.tracking.stored(measured.kind, measured.key)
            begin, end = (known.started_ms, known.ended_ms) if known else (started_ms, now_ms())
            self.tracking.publish(measured.changed(started_ms=begin, ended_ms=end))
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
    plan: Callable[Asked, Planned],
    run: Callable[[Planned, Context], Made],
    **local: Callable[[Any, Workspace | Path | str | None, Progress | None], Any],
) -> Callable[Asked, Made]:
    """Return the function that takes what `plan` takes, and runs the plan.

    It says what `run` says that it does, and takes and raises what `plan` says.

    Args:
        plan: Takes `workspace` and `progress`, and writes nothing.
        local: Of an argument that may name a model of the hub, the function that imports it.
    """

    @wraps(plan)
    def call(*args: Asked.args, **options: Asked.kwargs) -> Made:
        given: dict[str, Any] = options
        place = (given.get("workspace"), given.get("progress"))
        for name, imported in local.items():
            given[name] = imported(given.get(name), *place)
        found = plan(*args, **options)
        found.check()
        return run(found, open_context(*place))

    made, arguments = (function.__doc__ or "" for function in (run, plan))
    call.__name__ = call.__qualname__ = run.__name__.removeprefix("run_")
    call.__doc__ = made.partition("\n\n")[0] + "\n\n" + arguments.partition("\n\n")[2]
    returned = signature(run).return_annotation
    call.__signature__ = signature(plan).replace(return_annotation=returned)  # type: ignore[attr-defined]
    return call
