"""`iiet-orch`: build the application for the words of one call, run it, and return its exit code.

0 done, 1 failed (also while it was interrupted), 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys

from rich.console import Console

# Each registers its commands.
from orchestrator.cli import measure, models, places, train  # noqa: F401
from orchestrator.cli.command import NO_COLOR, build_app
from orchestrator.terminal.render import print_line
from orchestrator.terminal.stop import SIGNALS, signal_handlers
from orchestrator.workspace.errors import (
    DamagedFile,
    Interrupted,
    RunFailed,
    UserError,
    path_error_message,
)

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The words after `iiet-orch` (default: those of this process).
    """
    words = sys.argv[1:] if arguments is None else arguments
    if NO_COLOR in words:  # It may stand anywhere; Rich reads the variable.
        os.environ["NO_COLOR"] = "1"
    words = [word for word in words if word != NO_COLOR]
    code = 0
    if arguments is None:
        # Exit functions run in reverse order, so this one runs after those of the libraries.
        atexit.register(_end_interrupted_process)
    try:
        # SIGTERM is Ctrl-C also where nothing has to be saved.
        with signal_handlers([signal.SIGTERM], signal.default_int_handler):
            app = build_app(_typed_command(words))
            app(words, prog_name="iiet-orch")
    except BaseException as error:
        with signal_handlers(SIGNALS, signal.SIG_IGN):
            code = exit_code_of(error)
    finally:
        if code != INTERRUPTED:
            atexit.unregister(_end_interrupted_process)
        elif arguments is None:
            for number in SIGNALS:  # Nothing is left to interrupt.
                signal.signal(number, signal.SIG_IGN)
    return code


def _typed_command(words: list[str]) -> str:
    """Return the first word of this call, or of the line that a shell completes."""
    if "_IIET_ORCH_COMPLETE" in os.environ:
        # bash gives the line in one variable, other shells in another.
        line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
        words = [word for word in line.split()[1:] if not word.startswith("-")]
    return words[0] if words else ""


def _end_interrupted_process() -> None:
    """End this process without the interpreter's own end.

    Threads may still wait for a Ray that has ended. They could crash that end or print into it, and
    with all libraries loaded it takes seconds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def exit_code_of(error: BaseException) -> int:
    """Print why a command failed and return its exit code; raise unexpected errors."""
    if isinstance(error, SystemExit):  # Typer has printed what was wrong
        return error.code if isinstance(error.code, int) else 0
    sentence = str(error)
    if isinstance(error, Interrupted | KeyboardInterrupt):
        code = INTERRUPTED
        sentence = sentence or "interrupted"  # What has state to resume from says so itself.
    elif isinstance(error, UserError | RunFailed):
        is_mistake = isinstance(error, UserError) and not isinstance(error, DamagedFile)
        code = 2 if is_mistake else 1
    elif isinstance(error, OSError) and (of_path := path_error_message(error)):
        code = 2
        sentence = of_path
    else:
        raise error
    # File names may hold bytes that are not text; those are printed as escapes.
    sentence = sentence.encode("utf-8", "backslashreplace").decode()
    print_line(Console(stderr=True), f"iiet-orch: {sentence}")
    return code
