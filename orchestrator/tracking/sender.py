"""A background thread that sends operations in order, so that no caller waits for a server.

The thread lives only while something is pending. It is a daemon: a server that hangs delays
neither Ctrl-C nor the end of the process.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Sender(Generic[T]):
    """Calls a function with each item, one after the other, in a background thread."""

    def __init__(self, send: Callable[[T], None]) -> None:
        """Use `send`, which is only called in the background thread."""
        self._send = send
        self._pending: deque[T] = deque()  # The first one is being sent.
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, item: T) -> None:
        """Send an item after those before it; returns at once."""
        with self._changed:
            self._pending.append(item)
            if len(self._pending) == 1:
                thread = threading.Thread(target=self._send_from, args=(item,), daemon=True)
                thread.start()

    def wait(self, seconds: float) -> bool:
        """Return whether everything was sent within some seconds.

        Raises:
            BaseException: What `send` raised.
        """
        with self._changed:
            is_over = self._changed.wait_for(lambda: not self._pending, seconds)
            error, self._error = self._error, None
        if error:
            raise error
        return is_over

    def take_back(self) -> list[T]:
        """Return what was not sent completely; the item that is being sent is among it."""
        with self._changed:
            items = list(self._pending)
            self._pending.clear()
            return items

    def is_first(self, item: T) -> bool:
        """Return whether an item is being sent, and was not taken back."""
        with self._changed:
            return bool(self._pending) and self._pending[0] is item

    def _send_from(self, item: T) -> None:
        while True:
            try:
                self._send(item)
            except BaseException as error:
                self._error = error
            with self._changed:
                if not self.is_first(item):
                    return
                self._pending.popleft()
                self._changed.notify_all()
                if not self._pending:
                    return
                item = self._pending[0]
