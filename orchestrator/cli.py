"""The command line: thin commands that read settings, call stages and print one table.

Nothing heavy is imported at the top, so that `--help` is instant. Each command runs inside
`_session`, which opens the workspace, sends the libraries' noise to a log, draws progress, and
turns the four ways a command can end into exit codes: 0 done, 1 failed, 2 the user's mistake, 130
interrupted with the state saved.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console

from orchestrator.errors import Interrupted, StageFailed, UserError

app = typer.Typer(
    name="iiet-orch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Pretrain, sweep and distill iterative Transformers; show accuracy against their cost.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

WorkspaceOption = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        "-w",
        help="Folder for all that is made; IIET_WORKSPACE, else ./iiet-workspace.",
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="Settings: a YAML file, or the name of a shipped sweep."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="A setting, as training.num_steps=500."),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Let the libraries' own output through.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Data-parallel workers."),
]
GpusOption = Annotated[int | None, typer.Option("--gpus", min=0, help="GPUs, one worker each.")]
CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(help="Checkpoint or run folder; the workspace's newest IIET when left out."),
]


@dataclass(frozen=True)
class Session:
    """What a command works with."""

    workspace: Any
    progress: Any
    console: Console


@contextmanager
def _session(workspace: Path | None, command: str, *, verbose: bool) -> Iterator[Session]:
    """Open the workspace, send noise to its log, and say on failure where the log lies."""
    from orchestrator.console import terminal_progress
    from orchestrator.logs import command_log
    from orchestrator.workspace import open_workspace

    space = open_workspace(workspace)
    console = Console(highlight=False)
    with command_log(space.logs, command, verbose=verbose) as log:
        try:
            with terminal_progress(console) as progress:
                yield Session(space, progress, console)
        except (UserError, Interrupted, typer.Exit, click.ClickException, KeyboardInterrupt):
            raise
        except StageFailed as error:
            where = f"\nThe log is {log.path}" if log.path else ""
            raise StageFailed(f"{error}{where}") from error
        except Exception as error:
            if log.path is None:
                raise
            with log.path.open("a", encoding="utf-8") as file:
                traceback.print_exception(error, file=file)
            raise StageFailed(
                f"{type(error).__name__}: {error}\nThe traceback is in {log.path}"
            ) from error


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 failed, 2 the user's mistake, 130 interrupted.
    """
    try:
        result = app(arguments, prog_name="iiet-orch", standalone_mode=False)
    except (UserError, StageFailed) as error:
        _complain(str(error))
        return 2 if isinstance(error, UserError) else 1
    except (Interrupted, KeyboardInterrupt, click.Abort) as error:
        _complain(str(error) or "interrupted; the same command goes on from the last saved state")
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return result if isinstance(result, int) else 0


def _complain(text: str) -> None:
    Console(stderr=True, highlight=False).print(f"iiet-orch: {text}", markup=False, soft_wrap=True)
