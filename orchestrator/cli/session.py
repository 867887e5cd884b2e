"""What a command works with: its settings, the workspace, a progress display and a console.

While a command runs, the libraries' output goes to a log file. An unexpected error becomes one
sentence on the terminal and a traceback in that log.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rich.console import Console

from orchestrator.terminal.logs import command_log
from orchestrator.terminal.progress import Progress, terminal_progress
from orchestrator.workspace.errors import (
    Interrupted,
    RunFailed,
    UserError,
    is_disk_full,
    mask_secrets,
    path_error_message,
    shortened,
)

if TYPE_CHECKING:
    from orchestrator.pipelines.context import Context
    from orchestrator.reporting.output import Output, Result

WorkspaceUse = Literal["made", "read", "kept", "existing", "named"]
"""What a command needs of the workspace; `open_session` says what each means."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """An open workspace, and where to print."""

    workspace: Any
    progress: Progress
    console: Console
    terminal: TextIO
    """The terminal's standard error; `sys.stderr` goes to the log meanwhile."""
    output: TextIO
    """Standard output; `sys.stdout` may go to the log meanwhile."""


class Call:
    """One call of a command: at first use, the settings are read, then the workspace is opened."""

    def __init__(
        self,
        name: str,
        reads: Sequence[str],
        workspace_use: WorkspaceUse | None,
        *,
        has_settings: bool,
        config: str | None = None,
        set_: Sequence[str] | None = None,
        workspace: Path | None = None,
        dry_run: bool = False,
        as_json: bool = False,
        verbose: bool = False,
        quiet: bool = False,
    ) -> None:
        """Take what the command says of itself, and the options that commands share.

        Args:
            reads: Sections of the settings, and single settings, that the command reads.
            workspace_use: How the workspace is opened, which the command may change.
            has_settings: Whether it reads settings at all.
        """
        self.name = name
        self.reads = reads
        self.workspace_use = workspace_use
        self.has_settings = has_settings
        self.config = config
        """The settings file; a command may name another."""
        self.changes = set_ or ()
        """The values of `--set`."""
        self.path = workspace
        """The workspace, if the user named one."""
        self.dry_run = dry_run
        self.as_json = as_json
        self._verbose = verbose or (False if quiet else None)
        self._training_device: str | None = None
        self._settings: Any = None
        self.options = dict[str, Any]()
        """Setting -> its value, of those that options of the command change."""
        self.settings_of_options = dict[str, str]()
        """Option with a value, such as `--limit` -> the setting that it changes."""
        self.stack = ExitStack()
        """What is closed when the command ends: the workspace with its log and progress display."""

    def set(self, key: str, value: Any, *, option: str | None = None) -> None:
        """Change a setting before they are read, unless the value is missing or empty.

        Args:
            option: The option that the user gave for it, if it has one.
        """
        if value is None or value == []:
            return
        self.options[key] = value
        if option is not None:
            self.settings_of_options[option] = key

    def train_on(self, device: str | None) -> None:
        """Say where to train, `cpu` or `cuda`, before the settings are read; None: as they say."""
        self._training_device = device

    def refuse_unread(self, reads: Sequence[str] | None = None, *, reader: str = "") -> None:
        """Refuse `--set` and options of what the command does not read: the user expects that they
        change something. A file may have such sections, because several commands share it.

        Args:
            reads: What it reads, if that is less than the command says of itself.
            reader: What reads no more then, such as `export --no-measure`.

        Raises:
            UserError: Names each such setting, the command, and what it reads.
        """
        if not self.changes and not self.settings_of_options:
            return
        from orchestrator.settings import Settings
        from orchestrator.settings.resolve import changed_keys

        reads = self.reads if reads is None else reads
        changed = {f"{option} ({key})": key for option, key in self.settings_of_options.items()}
        for key in chain.from_iterable(map(changed_keys, self.changes)):
            changed[f"--set {shortened(key)}"] = key
        refused = []
        for source, key in changed.items():
            section = key.partition(".")[0]
            # What is no setting at all is refused when the settings are read.
            if section not in Settings.model_fields or is_read(key, reads):
                continue
            # The single settings of other sections would make the sentence long.
            shown = [r if r.startswith(f"{section}.") else r.partition(".")[0] for r in reads]
            instead = f", only {', '.join(dict.fromkeys(shown))}" if reads else ""
            refused.append(f"{source}: {reader or self.name} does not read this setting{instead}")
        if refused:
            raise UserError("\n".join(refused))

    @property
    def settings(self) -> Any:
        """The resolved settings, as `read_settings`."""
        return self.read_settings()

    def read_settings(self) -> Any:
        """Read the settings once: those of the file, changed by `--set` and by options.

        Raises:
            UserError: If the settings are wrong, or `--device cpu` and GPUs are asked for.
        """
        if self._settings is None:
            self._settings = self._resolved_settings()
        return self._settings

    def _resolved_settings(self) -> Any:
        from orchestrator.settings import read_settings
        from orchestrator.settings.files import shipped_sweeps

        file = self.config
        options = self.options
        device = self._training_device
        if file in shipped_sweeps() and Path(file).is_file():
            path = Path(file).absolute()
            print(f"settings: the file {path}, not the shipped sweep {file}", file=sys.stderr)
        if device == "cpu":
            for option, key in (
                ("--gpus", "cluster.num_gpus"),
                ("--gpus-per-trial", "sweep.gpus_per_trial"),
            ):
                if number := options.get(key):
                    raise UserError(f"--device cpu and {option} {number:g}: leave one out")
            options["cluster.num_gpus"] = 0
            options["cluster.min_gpus"] = None
            options["sweep.gpus_per_trial"] = None
        settings = read_settings(file or None, self.changes, options)
        if device == "cuda" and not settings.cluster.num_gpus:
            settings = read_settings(file or None, self.changes, options | {"cluster.num_gpus": 1})
        return settings

    @cached_property
    def session(self) -> Session:
        """The workspace and where to print."""
        if self.has_settings:
            self.read_settings()  # First, because a mistake in them makes no workspace.
        session = open_session(
            self.path,
            self.name,
            workspace_use=self.workspace_use,
            verbose=self._verbose,
            dry_run=self.dry_run,
            as_json=self.as_json,
        )
        return self.stack.enter_context(session)

    @property
    def common(self) -> dict[str, Any]:
        """Keyword arguments of a function of pipelines that may have something to say."""
        return {"workspace": self.session.workspace, "progress": self.session.progress}

    @property
    def context(self) -> Context:
        """What a plan runs in."""
        from orchestrator.pipelines.context import Context

        return Context(**self.common)

    def finish(self, plan: Any, run: Callable[[Any, Context], Output]) -> Output:
        """Return a plan for a dry run, else what it gives."""
        return plan if self.dry_run else run(plan, self.context)

    def imported(self, model: Path | None, *, also_folders: bool = False) -> Path | None:
        """Return a model as it is named in the workspace; one of the hub is imported first, and
        with `also_folders` any model folder."""
        if self.dry_run:
            return model
        from orchestrator.pipelines.models import imported_model

        return imported_model(model, also_folders=also_folders, **self.common)

    def print(self, output: Output | None) -> None:
        """Print a plan or a result as it was asked for; None if the command has printed something
        itself.

        Raises:
            RunFailed: If a part of it failed.
        """
        from orchestrator.reporting.output import Result

        if output is None:
            return
        if self.as_json:
            print(output.to_text(), file=self.session.output)
        else:
            self.show(output)
        if isinstance(output, Result):
            output.raise_failures()

    def show(self, output: Output) -> None:
        """Print what a terminal shows of a plan or a result."""
        from orchestrator.reporting.output import show

        show(output, self.session.console)

    def answer(self, values: dict[str, Any], lines: list[Any]) -> Result:
        """Return a result of a few values and lines."""
        from orchestrator.reporting.output import Answer

        return Answer(values=values, lines=lines)


def is_read(key: str, reads: Sequence[str]) -> bool:
    """Return whether a setting, or something in a section, is part of what is read."""
    return any(f"{key}.".startswith(f"{part}.") or part.startswith(f"{key}.") for part in reads)


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
    workspace_use: WorkspaceUse | None = "made",
    verbose: bool | None = None,
    dry_run: bool = False,
    as_json: bool = False,
) -> Iterator[Session]:
    """Open the workspace, send the libraries' output to a log, and name the log on failure.

    Args:
        workspace_use: `made`: the workspace is made if it is missing; `read`: likewise, but it may
            be one that cannot be written; `kept`: it must exist. Commands that only look need no
            log: `existing`, the workspace must exist; `named`, it need not; None, there is none.
        verbose: True shows the libraries' output, too; False shows no progress.
        dry_run: Write no log, and nothing else.
        as_json: Show progress on standard error; standard output is for the JSON.
    """
    from orchestrator.workspace import layout

    # Bound now: `sys.stdout` is replaced while libraries are silenced.
    output = sys.stdout
    terminal = sys.stderr
    log = None
    console = Console(file=output, highlight=False)
    space: Any = layout.locate_workspace(path) if workspace_use else None
    if workspace_use in ("kept", "existing") and not space.is_made:
        raise UserError(
            f"there is no workspace {space.root}; name one with --workspace, or "
            "`iiet-orch quickstart` makes one"
        )
    file_name = layout.WORKSPACE_FILE_NAME
    if workspace_use == "existing" and not (space.root / file_name).is_file():
        raise UserError(f"{space.root / file_name} is missing; `iiet-orch report` writes it anew")
    streams: dict[str, Any] = {"terminal": terminal, "output": output}
    if workspace_use not in ("made", "read", "kept"):
        notes = Warnings(terminal)
        yield Session(workspace=space, progress=notes, console=console, **streams)
        return
    with ExitStack() as stack:
        try:
            if dry_run:
                from orchestrator.models.hub import DRY_RUN, offline

                stack.enter_context(offline(DRY_RUN))
                space = layout.find_workspace(path)
                is_other = False
            else:
                is_other = stack.enter_context(layout.unmade_by_mistakes(space))
                space = layout.open_workspace(path, must_write=workspace_use != "read")
            without_log = bool(verbose) or dry_run or not space.is_writable
            log, terminal = stack.enter_context(
                command_log(space.logs, command, verbose=without_log)
            )
            if is_other:
                text = f"{space.root} holds other files, and becomes a workspace beside them"
                Warnings(terminal).note(text)
            if not space.is_writable:
                Warnings(terminal).note(f"{space.root} cannot be written, so nothing is stored")
            if as_json:
                console = Console(file=terminal, highlight=False)
                # What libraries print, or Ray's workers, must not get between the JSON.
                stack.enter_context(redirect_stdout(sys.stderr))
            quiet = Warnings(terminal) if verbose is False else None
            streams = {"terminal": terminal, "output": output}
            with quiet or terminal_progress(console) as progress:
                yield Session(workspace=space, progress=progress, console=console, **streams)
        except Exception as error:
            if (shown := _as_shown(error, log, space.root)) is error:
                raise
            raise shown from error


def _as_shown(error: Exception, log: Path | None, root: Path) -> Exception:
    """Return what the user sees of an error; the traceback of an unexpected one goes to the log."""
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, RunFailed) and log is not None:
        return RunFailed(f"{error}\nThe log is {log}")
    if isinstance(error, RunFailed | Interrupted):
        return error
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
