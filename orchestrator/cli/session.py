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
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from orchestrator.cli.json_output import print_json
from orchestrator.terminal.progress import Progress, terminal_progress
from orchestrator.workspace.errors import (
    Interrupted,
    RunFailed,
    UserError,
    is_disk_full,
    mask_secrets,
    path_error_message,
)

if TYPE_CHECKING:
    from orchestrator.workspace.layout import Workspace


@dataclass(frozen=True)
class Session:
    """What a command works with; see the module's docstring."""

    workspace: Workspace
    progress: Progress
    console: Console
    terminal: TextIO
    """The terminal's standard error; `sys.stderr` goes to the log meanwhile."""
    output: TextIO
    """Standard output; `sys.stdout` may go to the log meanwhile."""

    @property
    def common(self) -> dict[str, Any]:
        """The keyword arguments that every pipeline takes."""
        return {"workspace": self.workspace, "progress": self.progress}

    def print_json(self, value: Any) -> None:
        """Print the result of a command with `--json`."""
        print_json(value, self.output)


class Warnings(Progress):
    """Prints notes, and nothing else, to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def note(self, text: str) -> None:
        """Print a note."""
        print(mask_secrets(text), file=self._stream)


@contextmanager
def open_session(
    workspace: Path | None,
    command: str,
    *,
    verbose: bool | None,
    dry_run: bool = False,
    as_json: bool = False,
    must_write: bool = True,
) -> Iterator[Session]:
    """Open the workspace, send the libraries' output to a log, and name the log on failure.

    Args:
        verbose: True shows the libraries' output, too; False shows no progress.
        dry_run: Write no log, and nothing else.
        as_json: Show progress on standard error; standard output is for the JSON.
        must_write: Whether the command is useless where nothing can be stored.
    """
    from orchestrator.terminal.logs import command_log
    from orchestrator.workspace.layout import locate_workspace, open_workspace
    from orchestrator.workspace.read_only import read_only

    # Bound now: `sys.stdout` is replaced while libraries are silenced.
    output = sys.stdout
    console = Console(file=output, highlight=False)
    with _full_disk_as_failure(locate_workspace(workspace).root), ExitStack() as stack:
        if dry_run:
            stack.enter_context(read_only())
        space = open_workspace(workspace, must_write=must_write)
        without_log = bool(verbose) or dry_run or not space.is_writable
        log, terminal = stack.enter_context(command_log(space.logs, command, verbose=without_log))
        if not space.is_writable:
            Warnings(terminal).note(f"{space.root} cannot be written, so nothing is stored")
        if as_json:
            console = Console(file=terminal, highlight=False)
            # What libraries print, or Ray's workers, must not get between the JSON.
            stack.enter_context(redirect_stdout(sys.stderr))
        try:
            with Warnings(terminal) if verbose is False else terminal_progress(console) as progress:
                yield Session(space, progress, console, terminal, output)
        except (UserError, Interrupted):
            raise
        except KeyboardInterrupt:
            raise Interrupted from None
        except RunFailed as error:
            where = f"\nThe log is {log}" if log else ""
            raise RunFailed(f"{error}{where}") from error
        except Exception as error:
            extensions = sys.modules.get("iiet.extensions")  # Imported here, it would load torch.
            if extensions and isinstance(error, extensions.ExtensionError):
                raise UserError(str(error)) from error
            if is_disk_full(error):
                raise
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(mask_secrets("".join(traceback.format_exception(error))))
            if isinstance(error, OSError) and (sentence := path_error_message(error)):
                raise UserError(sentence) from error
            if log is None:
                raise
            raise RunFailed(
                f"{type(error).__name__}: {error}{_notes(error)}\nThe traceback is in {log}"
            ) from error


@contextmanager
def _full_disk_as_failure(root: Path) -> Iterator[None]:
    try:
        yield
    except (RunFailed, Interrupted):
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise RunFailed(
            f"no space is left on the disk of {root}, of another folder to write, or of temporary "
            "files; free some space, then run the same command again to resume from what was "
            f"saved{_notes(error)}"
        ) from error


def _notes(error: BaseException) -> str:
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
