"""How long a job waits until all of its workers have a place.

Ray Train asks for the places again and again, for ever. A run that starts for the first time gives
up after minutes: somebody waits at the terminal. Later, a node may be lost at night, and the run
waits for its replacement as long as `cluster.node_wait_minutes` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.cluster.messages import Message
from orchestrator.cluster.placement import Placement
from orchestrator.terminal.render import format_duration
from orchestrator.workspace.errors import RunFailed

# isort: split
# After our own modules, because `orchestrator.cluster.start` sets the environment that Ray reads.
import ray
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import state as controller

FIRST_START_SECONDS = 300.0
"""Longest wait for the first start; a cluster that can never hold the job was refused before."""
MAX_FAILED_STARTS = 3
"""Starts in a row that fail although there is a place, such as on a node that has just died."""
SECONDS_BETWEEN_LOOKS = 10.0
"""How often a job that asks for no place, because too few nodes are left, is said to wait."""


@dataclass
class NodeWait:
    """Decides when a job has waited for too long; it knows nothing of Ray."""

    has_started: bool
    """Whether the workers of the run have ever started, now or before."""
    minutes: float | None
    """Longest wait after the first start; None waits for ever."""
    clock: Callable[[], float] = time.monotonic
    _since: float | None = None
    _num_failed: int = 0

    def begin(self) -> None:
        """Note that the workers do not run."""
        self._since = self.clock() if self._since is None else self._since

    def started(self) -> None:
        """Note that all workers run."""
        self.has_started, self._since, self._num_failed = True, None, 0

    def no_place(self, found: str) -> None:
        """Note that workers had no place at the latest attempt; `found` says what is there.

        Raises:
            RunFailed: If the job has waited for too long.
        """
        self.begin()
        self._num_failed = 0
        seconds = self.clock() - (self._since or 0.0)
        if not self.has_started and seconds >= FIRST_START_SECONDS:
            raise RunFailed(
                f"there was no place for {format_duration(FIRST_START_SECONDS)} ({found}); wait "
                "until others have finished, or ask for fewer"
            )
        if self.has_started and self.minutes is not None and seconds >= 60.0 * self.minutes:
            raise RunFailed(
                f"no node replaced a lost one within {self.minutes:g} min ({found}); add a node "
                "and run the same command again, or raise cluster.node_wait_minutes"
            )

    def failed(self, error: Exception | None) -> None:
        """Note that workers had a place, and did not start.

        Raises:
            RunFailed: If that happened too often in a row.
        """
        self._num_failed += 1
        if self._num_failed > MAX_FAILED_STARTS:
            raise RunFailed(f"the workers did not start: {error}")


class NodeWatch(ControllerCallback):
    """Applies `NodeWait` in Ray Train's controller of a job, and tells the driver of the wait."""

    def __init__(
        self, wait: NodeWait, placement: Placement, *, announce: Message, name: str
    ) -> None:
        """Watch a job.

        Args:
            wait: Decides when it has waited for too long.
            placement: What it needs.
            announce: Gets a sentence while it waits, and an empty text while its workers run.
            name: Its name in the sentence.
        """
        self._wait, self._placement, self._announce, self._name = wait, placement, announce, name
        self._looked_at = time.monotonic()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Note the progress of a start."""
        if isinstance(current_state, controller.RunningState):
            if not isinstance(previous_state, controller.RunningState):
                self._wait.started()
                self._announce.post("")
        elif isinstance(current_state, controller.ReschedulingState):
            error = current_state.training_failed_error
            failure = getattr(error, "controller_failure", error)
            if isinstance(failure, WorkerGroupStartupTimeoutError):
                self._no_place()
            else:
                self._wait.failed(failure)
        elif not isinstance(current_state, controller.ShuttingDownState):
            self._wait.begin()
            if type(previous_state) is type(current_state):
                self._wait_for_fewest()

    def _wait_for_fewest(self) -> None:
        # A job whose number of workers varies asks Ray for no place while there are too few nodes.
        if time.monotonic() - self._looked_at > SECONDS_BETWEEN_LOOKS:
            self._looked_at = time.monotonic()
            self._no_place()

    def _no_place(self) -> None:
        found = _found(self._placement)
        self._announce.post(f"{self._name} waits for a place: {found}")
        self._wait.no_place(found)


def _found(placement: Placement) -> str:
    kind, each = ("GPU", placement.gpus) if placement.use_gpu else ("CPU", placement.cpus)
    needed = (placement.min_workers or placement.workers) * each
    free = ray.available_resources().get(kind, 0.0)  # type: ignore[no-untyped-call]
    return f"{min(free, needed):g} of {needed:g} {kind}s are free"
