"""Save a job's state before Ray Train starts its workers again in another number.

Ray Train ends all workers when nodes have joined, and the new ones resume from the newest
checkpoint. Without a new one, a job would lose the steps since the last.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from orchestrator.cluster.messages import Inbox, Message
from orchestrator.workspace.layout import find_checkpoints

# isort: split
# After our own modules, because `orchestrator.cluster.start` sets the environment that Ray reads.
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

POLL_SECONDS = 0.2


class SaveBeforeResize(ControllerCallback):
    """Asks a job's workers for a checkpoint, in Ray Train's controller, and waits for it."""

    def __init__(self, run_folder: Path, request: Message, *, seconds: float) -> None:
        """Watch a job.

        Args:
            run_folder: Where it writes checkpoints.
            request: Reaches the workers; see `SaveRequests`.
            seconds: Longest wait.
        """
        self._run_folder, self._request, self._seconds = run_folder, request, seconds

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:  # noqa: ARG002
        """Wait for a new checkpoint before the workers end."""
        if isinstance(current_state, ResizingState):
            before, deadline = find_checkpoints(self._run_folder), time.monotonic() + self._seconds
            self._request.post(str(deadline))
            while find_checkpoints(self._run_folder) == before and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)


class SaveRequests:
    """The requests that reach a worker; those from before its start are not for it."""

    def __init__(self, inbox: Inbox, request: Message) -> None:
        self._inbox, self._request = inbox, request
        self._answered = inbox.text(request)

    def take(self) -> bool:
        """Return whether there is a request that was not taken before."""
        text = self._inbox.text(self._request)
        is_new, self._answered = text != self._answered, text
        return is_new
