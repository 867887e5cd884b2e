"""Messages between a driver and the processes of its jobs on any node.

They travel through Ray's key-value store (in its head process): a file on NFS would appear on other
nodes up to a minute later, and an actor would be one more process. A message belongs to one driver,
so that what a killed one left behind reaches nobody; its hundred bytes stay until the cluster ends.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import orchestrator.cluster  # noqa: F401 - it sets the environment that Ray reads when imported

# isort: split
import ray.exceptions
from ray.experimental import internal_kv

NAMESPACE = "iiet-orch"
SECONDS_BETWEEN_LOOKS = 0.5


def _new_key() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Message:
    """A message that is posted or not; whoever has a copy of this object posts or reads it."""

    key: str = field(default_factory=_new_key)
    """Name in Ray's store; unique, so that only copies of one object share a message."""

    def part(self, name: str) -> Message:
        """Return the message of a part, such as one of several trials."""
        return Message(f"{self.key}/{name}")

    def post(self, text: str = "") -> None:
        """Post it, with a text that replaces the one before."""
        internal_kv._internal_kv_put(self.key, text, namespace=NAMESPACE)

    def read(self) -> str | None:
        """Return its text; None if it is not posted."""
        value: bytes | None = internal_kv._internal_kv_get(self.key, namespace=NAMESPACE)
        return None if value is None else value.decode()

    def is_posted(self) -> bool:
        """Return whether it is posted."""
        return self.read() is not None


class Inbox:
    """The messages that have arrived in this process; asking takes no time."""

    def __init__(self, messages: Sequence[Message]) -> None:
        """Look for messages once; `watch_messages` continues in a thread."""
        self._messages = messages
        self._texts: dict[Message, str | None] = {}
        self.look()

    def has(self, message: Message) -> bool:
        """Return whether a message had arrived at the latest look."""
        return self.text(message) is not None

    def text(self, message: Message) -> str | None:
        """Return a message's text at the latest look; None if it had not arrived."""
        return self._texts.get(message)

    def look(self) -> None:
        """Look for messages that were posted since the last call."""
        self._texts = {message: message.read() for message in self._messages}


@contextmanager
def watch_messages(*messages: Message) -> Iterator[Inbox]:
    """Look for messages regularly until the block ends."""
    inbox = Inbox(messages)
    with look_regularly(inbox.look):
        yield inbox


@contextmanager
def look_regularly(look: Callable[[], None]) -> Iterator[None]:
    """Ask Ray's head process every `SECONDS_BETWEEN_LOOKS`, in a thread, until the block ends."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(SECONDS_BETWEEN_LOOKS):
            try:
                look()
            except ray.exceptions.RayError:
                continue  # The head process is busy, or gone; then Ray ends this process.

    thread = threading.Thread(target=watch, name="messages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
