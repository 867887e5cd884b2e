"""Redirect the libraries' output from the terminal to a log file in the workspace.

Ray, gloo and others write to file descriptor 2 from C++ and from child processes, which replacing
`sys.stderr` would not catch. So the descriptor itself points to the log while a command runs; the
program's own messages go to a saved copy of it.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from orchestrator.workspace.errors import mask_secrets
from orchestrator.workspace.locks import is_locked, lock_descriptor, write_holder

NUM_LOGS_KEPT = 20


@contextmanager
def command_log(
    folder: Path, command: str, *, verbose: bool
) -> Iterator[tuple[Path | None, TextIO]]:
    """Redirect standard error to a new log file until the block ends, unless `verbose`.

    Yields the log file, or None, and the user's terminal. The file is locked meanwhile, so that
    `list running` finds the command. The folder keeps `NUM_LOGS_KEPT` files, and those of commands
    that still run.
    """
    if verbose:
        yield None, sys.stderr
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Names begin with the time, so the oldest logs come first.
    for old_log in sorted(folder.glob("*.log"))[: -NUM_LOGS_KEPT + 1]:
        if not is_locked(old_log):
            old_log.unlink(missing_ok=True)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{command}-{os.getpid()}.log"
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # Not inherited by child processes.
    with suppress(OSError):  # A file system without locks.
        lock_descriptor(lock)
        write_holder(lock)
    sys.stderr.flush()  # What is buffered belongs on the terminal.
    saved = os.dup(2)
    with path.open("ab") as log:
        os.dup2(log.fileno(), 2)
    handler = logging.FileHandler(path)
    handler.setFormatter(_MaskingFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("orchestrator").setLevel(logging.INFO)
    logging.captureWarnings(True)
    terminal = io.TextIOWrapper(os.fdopen(os.dup(saved), "wb"), write_through=True)
    try:
        yield path, terminal
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
        handler.close()
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        terminal.close()
        os.close(lock)
        mask_secrets_in_file(path)


def mask_secrets_in_file(path: Path) -> None:
    """Mask passwords in a log: libraries and child processes write past this process's logging.

    A log that somebody has deleted is no error.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return
    if (masked := mask_secrets(text)) != text:
        path.write_text(masked, encoding="utf-8", errors="surrogateescape")


class _MaskingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return mask_secrets(super().format(record))
