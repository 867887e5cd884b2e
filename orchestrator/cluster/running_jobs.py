"""The training jobs of a driver while they run in Ray, and the messages that concern one job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from orchestrator.cluster.messages import Message, watch_messages
from orchestrator.planning.estimate import seconds_to_save
from orchestrator.records.training import TrainingJob
from orchestrator.terminal.stop import wait_for_work
from orchestrator.training.watching import describe_saved_state
from orchestrator.workspace.journal import JOURNAL_NAME


class RunningJobs:
    """Jobs of this driver while they run: waits for them, says what they wait for, stops them."""

    def __init__(
        self, jobs: Sequence[TrainingJob], stop: Message, note: Callable[[str], None] | None
    ) -> None:
        """Take jobs before they are started; `stop` asks them to save and return."""
        self._stop, self._note = stop, note
        self._jobs = {wait_message(stop, job): job for job in jobs}
        self._sizes = {job.run_folder: journal_bytes(job) for job in jobs}
        self._said: dict[Message, str | None] = {}

    def wait_for(self, trainings: Sequence[Future[None]], watch: Callable[[], None] | None) -> None:
        """Wait until all have ended; see `wait_for_work`.

        Raises:
            Interrupted: After a signal.
            Exception: The first failed job's own.
        """
        with watch_messages(*self._jobs) as self._inbox:

            def show() -> None:
                self._say_what_they_wait_for()
                if watch:
                    watch()

            named = {job.folder.name: job for job in self._jobs.values()}
            wait_for_work(
                trainings,
                ask_to_stop=self._ask_to_stop,
                saved=partial(describe_saved_state, named),
                watch=show,
            )

    def _say_what_they_wait_for(self) -> None:
        for message in self._jobs:
            text = self._inbox.text(message)
            if self._note and text and text != self._said.get(message):
                self._note(text)
            self._said[message] = text

    def _ask_to_stop(self) -> float:
        self._stop.post()
        # A job that waits for a node has nothing to save, nor one that has written nothing yet.
        begun = [
            job
            for message, job in self._jobs.items()
            if not self._inbox.text(message) and journal_bytes(job) > self._sizes[job.run_folder]
        ]
        return seconds_to_save(begun, self._note) if begun else 0.0


def wait_message(stop: Message, job: TrainingJob) -> Message:
    """Return the message that says what a job waits for; its text is empty while it runs."""
    return stop.part(job.run_folder)


def save_request(stop: Message, job: TrainingJob) -> Message:
    """Return the message that asks a job for a checkpoint."""
    return stop.part(job.run_folder).part("save")


def journal_bytes(job: TrainingJob) -> int:
    """Return the size of a job's journal; 0 if it was never started."""
    path = job.folder / JOURNAL_NAME
    return path.stat().st_size if path.exists() else 0
