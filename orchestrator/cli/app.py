"""The application that commands register with, and its exit codes.

0 done, 1 failed (also while it was interrupted), 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer
from rich.console import Console

from orchestrator.cli.help import Application
from orchestrator.terminal.layout import print_line
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError, path_error_message
from orchestrator.workspace.provenance import installed_version

_SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)+=")

app = Application(
    name="iiet-orch",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Pretrain, sweep and distill iterative Transformers; show accuracy against their cost.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"iiet-orch {installed_version('iiet-orch')}")
        raise typer.Exit


@app.callback()
def _options_of_all(
    _version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version."),
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The words after `iiet-orch` (default: those of this process).
    """
    try:
        app(arguments, prog_name="iiet-orch")
    except BaseException as error:
        code = exit_code_of(error)
        words = sys.argv[1:] if arguments is None else arguments
        if code == 2 and (setting := _bare_setting(words)):
            _complain(f"{setting} looks like a setting; write --set {setting}")
        return code
    return 0


def _bare_setting(words: list[str]) -> str | None:
    """Return the first word such as `training.num_steps=500` that no option takes."""
    pairs = zip(["", *words], words, strict=False)
    return next((w for option, w in pairs if _SETTING.match(w) and option[:1] != "-"), None)


def exit_code_of(error: BaseException) -> int:
    """Print why a command failed and return its exit code; raise unexpected errors."""
    if isinstance(error, SystemExit):  # Typer has printed what was wrong
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, Interrupted):
        _complain(str(error) or "interrupted; run the same command again to resume")
        return 130
    if isinstance(error, UserError | RunFailed):
        _complain(str(error))
        return 2 if isinstance(error, UserError) else 1
    if isinstance(error, OSError) and (sentence := path_error_message(error)):
        _complain(sentence)
        return 2
    raise error


def _complain(text: str) -> None:
    # File names may hold bytes that are not text; those are printed as escapes.
    text = text.encode("utf-8", "backslashreplace").decode()
    print_line(Console(stderr=True), f"iiet-orch: {text}")
