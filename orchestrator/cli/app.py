"""The application that commands register with, and how a command ends.

Four ways to end become exit codes: 0 done, 1 failed, 2 the user's mistake, 130 interrupted. What
fails while it is being interrupted has failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console

from orchestrator.cli.help import Application
from orchestrator.terminal.layout import print_line
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError, path_error_message

app = Application(
    name="iiet-orch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Pretrain, sweep and distill iterative Transformers; show accuracy against their cost.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    return exit_code_of(lambda: app(arguments, prog_name="iiet-orch"))


def exit_code_of(work: Callable[[], object]) -> int:
    """Do work, and say on standard error why it did not end well.

    Returns:
        The exit code: 0 done, 1 failed, 2 the user's mistake, 130 interrupted.
    """
    try:
        work()
    except SystemExit as end:  # Typer's own way to end, after it has shown what was wrong
        return end.code if isinstance(end.code, int) else 0
    except (UserError, RunFailed) as error:
        _complain(str(error))
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:
        if not (sentence := path_error_message(error)):
            raise
        _complain(sentence)
        return 2
    except Interrupted as error:
        _complain(str(error) or "interrupted; start the same command again to go on")
        return 130
    return 0


def _complain(text: str) -> None:
    # A file's name may hold bytes that are no text; they are shown as such.
    text = text.encode("utf-8", "backslashreplace").decode()
    print_line(Console(stderr=True), f"iiet-orch: {text}")
