"""`iiet-orch`: all commands; run one and return its exit code.

0 done, 1 failed (also while it was interrupted), 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from orchestrator.cli import measure, models, train, workspace
from orchestrator.terminal.render import print_line
from orchestrator.terminal.stop import SIGNALS, signal_handlers
from orchestrator.workspace.errors import (
    DamagedFile,
    Interrupted,
    RunFailed,
    UserError,
    path_error_message,
)
from orchestrator.workspace.provenance import installed_version

NO_COLOR = "--no-color"
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""


class _PlainErrors(TyperGroup):
    """All commands; errors say what is wrong with a value without the name of an exception."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


commands = typer.Typer(
    name="iiet-orch",
    cls=_PlainErrors,
    help="Pretrain, sweep and distill iterative Transformers; show accuracy against cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# The panels of `--help` have the order of their first commands.
commands.add_typer(train.app)
commands.add_typer(measure.app)
commands.add_typer(models.app)
commands.add_typer(workspace.app)
commands.add_typer(workspace.config_app, name="config", rich_help_panel="Start")


def _print_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"iiet-orch {installed_version('iiet-orch')}")
        raise typer.Exit


@commands.callback()
def _options_of_all(
    _version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version."),
    ] = False,
    _no_color: Annotated[
        bool, typer.Option(NO_COLOR, help="Print no colours; so does NO_COLOR=1.")
    ] = False,
) -> None:
    pass


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
            commands(words, prog_name="iiet-orch")
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
        sentence = sentence or "interrupted"  # Work that can be resumed has its own message.
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
