"""The workspace, progress display and console of a command, and a log of the libraries' output.

An unexpected error becomes one sentence on the terminal and a traceback in that log.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console

from orchestrator.terminal.progress import Progress, terminal_progress
from orchestrator.workspace.errors import (
    Interrupted,
    RunFailed,
    UserError,
    is_disk_full,
    mask_secrets,
    path_error_message,
)

Place = Literal["made", "read", "existing", "named"]


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a command works with; see the module's docstring."""

    workspace: Any
    progress: Progress
    console: Console
    terminal: TextIO
    """The terminal's standard error; `sys.stderr` goes to the log meanwhile."""
    output: TextIO
    """Standard output; `sys.stdout` may go to the log meanwhile."""


class Warnings(Progress):
    """Prints notes, and nothing else, to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def note(self, text: str) -> None:
        """Print a note."""
        print(mask_secrets(text), file=self._stream)


@contextmanager
def open_session(
    path: Path | None,
    command: str,
    *,
    place: Place | None = "made",
    verbose: bool | None = None,
    dry_run: bool = False,
    as_json: bool = False,
) -> Iterator[Session]:
    """Open the workspace, send the libraries' output to a log, and name the log on failure.

    Args:
        place: `made`: the workspace is made if it is missing; `read`: likewise, but it may be one
            that cannot be written. Commands that only look need no log: `existing`, the workspace
            must exist; `named`, it need not; None, there is none.
        verbose: True shows the libraries' output, too; False shows no progress.
        dry_run: Write no log, and nothing else.
        as_json: Show progress on standard error; standard output is for the JSON.
    """
    from orchestrator.workspace.layout import find_workspace, locate_workspace, open_workspace

    # Bound now: `sys.stdout` is replaced while libraries are silenced.
    output, terminal, log = sys.stdout, sys.stderr, None
    console = Console(file=output, highlight=False)
    space: Any = locate_workspace(path) if place else None
    if place not in ("made", "read"):
        if place == "existing" and not space.root.is_dir():
            raise UserError(
                f"there is no workspace {space.root}; name one with --workspace, or "
                "`iiet-orch quickstart` makes one"
            )
        yield Session(
            workspace=space,
            progress=Warnings(terminal),
            console=console,
            terminal=terminal,
            output=output,
        )
        return

    from orchestrator.terminal.logs import command_log

    with ExitStack() as stack:
        try:
            if dry_run:
                from orchestrator.models.hub import DRY_RUN, offline

                stack.enter_context(offline(DRY_RUN))
                space = find_workspace(path)
            else:
                space = open_workspace(path, must_write=place == "made")
            without_log = bool(verbose) or dry_run or not space.is_writable
            log, terminal = stack.enter_context(
                command_log(space.logs, command, verbose=without_log)
            )
            if not space.is_writable:
                Warnings(terminal).note(f"{space.root} cannot be written, so nothing is stored")
            if as_json:
                console = Console(file=terminal, highlight=False)
                # What libraries print, or Ray's workers, must not get between the JSON.
                stack.enter_context(redirect_stdout(sys.stderr))
            quiet = Warnings(terminal) if verbose is False else None
            with quiet or terminal_progress(console) as progress:
                yield Session(
                    workspace=space,
                    progress=progress,
                    console=console,
                    terminal=terminal,
                    output=output,
                )
        except KeyboardInterrupt:
            raise Interrupted from None
        except Exception as error:
            if (shown := _as_shown(error, log, space.root)) is error:
                raise
            raise shown from error


def _as_shown(error: Exception, log: Path | None, root: Path) -> Exception:
    """Return what the user sees of an error; the traceback of an unexpected one goes to the log."""
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, RunFailed | Interrupted):
        named = isinstance(error, RunFailed) and log
        return RunFailed(f"{error}\nThe log is {log}") if named else error
    if is_disk_full(error):
        return RunFailed(
            f"no space is left on the disk of {root}, of another folder to write, or of temporary "
            "files; free some space, then run the same command again to resume from what was "
            f"saved{notes}"
        )
    if isinstance(error, UserError):
        return error
    extensions = sys.modules.get("iiet.extensions")  # Imported here, it would load torch.
    if extensions and isinstance(error, extensions.ExtensionError):
        return UserError(str(error))
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(mask_secrets("".join(traceback.format_exception(error))))
    if isinstance(error, OSError) and (sentence := path_error_message(error)):
        return UserError(sentence)
    if log is None:
        return error
    return RunFailed(f"{type(error).__name__}: {error}{notes}\nThe traceback is in {log}")
