"""`@Command`: a function and the settings that it takes become a command of `iiet-orch`.

A command's options are its own parameters (the `Args:` of its docstring are their help), then
settings by their key (type, range, choices and help are those of the field), then what commands
share: settings file, `--set`, workspace, `--dry-run`, `--json`, `--quiet`. The function gets a
`Call` and returns a plan or a result, which is printed here. Only the command that is called is
built, since the settings take time to import.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from typer.models import OptionInfo as Option

from orchestrator.cli.options import MAX_COUNT
from orchestrator.cli.session import Place, Session, Warnings, open_session
from orchestrator.workspace.errors import UserError, quoted
from orchestrator.workspace.provenance import installed_version

if TYPE_CHECKING:
    from orchestrator.pipelines.context import Context
    from orchestrator.pipelines.result import Result

Function = TypeVar("Function", bound=Callable[..., Any])

NO_COLOR = "--no-color"
METAVARS = {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH", list: "TEXT"}
"""What the help says of an option's type; Typer's own are wide, and Python's names."""


@dataclass(frozen=True)
class Setting:
    """An option for a setting whose field does not say all."""

    key: str
    """Such as `training.num_steps`."""
    type: Any = None
    """The option's type (default: the field's)."""
    convert: Callable[[Any], Any] | None = None
    """From the option's value to the setting's."""
    help: str | None = None
    """(Default: the field's description.)"""
    hidden: bool = False
    """Whether the help leaves it out."""


@dataclass(frozen=True)
class Call:
    """What a command works with."""

    session: Session
    settings: Any
    """The resolved settings, if the command has options that are settings."""
    dry_run: bool = False
    as_json: bool = False
    logs_training: bool = False

    @property
    def workspace(self) -> Any:
        """The workspace."""
        return self.session.workspace

    @cached_property
    def context(self) -> Context:
        """What a pipeline runs in, the same at each use."""
        from orchestrator.pipelines.context import Context

        loggers = self.settings.tracking.loggers if self.logs_training else ()
        return Context(self.session.workspace, self.session.progress, loggers=loggers)

    @property
    def is_quiet(self) -> bool:
        """Whether the user wants results and warnings only."""
        return isinstance(self.session.progress, Warnings)

    def note(self, text: str) -> None:
        """Say something beside the result, on standard error."""
        self.session.progress.note(text)

    def show(self, result: Result) -> None:
        """Print what a terminal shows of a result."""
        from orchestrator.pipelines.result import show

        show(result, self.session.console)

    def answer(self, values: dict[str, Any], lines: list[Any]) -> Result:
        """Return a result of a few values and lines."""
        from orchestrator.pipelines.result import Answer

        return Answer(values=values, lines=lines)

    @property
    def common(self) -> dict[str, Any]:
        """The keyword arguments that every function of pipelines takes."""
        return {"workspace": self.session.workspace, "progress": self.session.progress}


@dataclass
class Command:
    """A command; as a decorator, it makes one of a function and registers it."""

    name: str
    """A name with a space is a command of a group, `config show`."""
    _: KW_ONLY
    group: str
    """Panel of `--help`."""
    options: Mapping[str, str | Setting] = field(default_factory=dict)
    """`--flag` or `--flag,-f` to the key of a setting."""
    config: Any = None
    """Annotation of the option or argument that names the settings file; None for commands that
    read none."""
    config_default: Any = None
    adjust: Callable[[dict[str, Any], dict[str, Any]], str | None] | None = None
    """Gets the command's values and the settings among its options by key; may change the latter,
    and returns another settings file, or None."""
    workspace: Place | None = "made"
    """How the workspace is opened, see `open_session`; None if the command has none."""
    trains: bool = False
    """Whether it takes `--device cpu|cuda`, which says where to train."""
    plans: bool = False
    """Whether it takes `--dry-run`."""
    has_json: bool = True
    """Whether it takes `--json`."""
    context_settings: dict[str, Any] | None = None
    """See `typer.Typer.command`."""

    def __call__(self, function: Function) -> Function:
        """Register the function as this command."""
        self.function = function
        self.text, _ = _described(function)
        self.settings = {
            flags: setting if isinstance(setting, Setting) else Setting(setting)
            for flags, setting in self.options.items()
        }
        has_log = self.workspace in ("made", "read")
        shared = {
            "device": self.trains,
            "set_": self.config is not None,
            "workspace": self.workspace is not None,
            "dry_run": self.plans,
            "as_json": self.has_json,
            "verbose": has_log,
            "quiet": has_log,
        }
        self.shared = [name for name, has_it in shared.items() if has_it]
        COMMANDS[self.name] = self
        return function

    def build(self) -> Callable[..., None]:
        """Return a function that has all options in its signature, for Typer."""
        parameters = _parameters(self.function)
        for flags, setting in self.settings.items():
            parameters.append(_parameter(_name(flags), None, _option(flags, setting)))
        if self.config is not None:
            parameters.append(_parameter("config", self.config_default, self.config))
        parameters += [shared for shared in _parameters(_shared) if shared.name in self.shared]

        for parameter in parameters:
            kind = _plain_type(parameter.annotation)
            for info in parameter.annotation.__metadata__:
                if isinstance(info, Option) and info.metavar is None:
                    info.metavar = METAVARS.get(kind, "CHOICE")
                    if get_origin(kind) is Literal:
                        info.help = f"{', '.join(get_args(kind))}. {info.help or ''}"

        run: Any = partial(self.run)
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = self.text
        return run  # type: ignore[no-any-return]

    def run(self, **values: Any) -> None:
        """Read the settings, open the workspace, call the function and print what it returns."""
        options: dict[str, Any] = {}
        for flags, setting in self.settings.items():
            value = values.pop(_name(flags))
            if value is not None and value != []:
                convert = setting.convert or partial(_converted, setting.key)
                options[setting.key] = convert(value)
        config, changes = values.pop("config", None), values.pop("set_", None) or []
        shared = {name: values.pop(name) for name in self.shared if name in values}
        if self.adjust:
            config = self.adjust({**values, **shared, "config": config}, options) or config
        settings = None
        if self.options or self.config is not None:
            settings = _read(config, changes, options, train_on=shared.get("device"))
        as_json, dry_run = shared.get("as_json", False), shared.get("dry_run", False)
        with open_session(
            shared.get("workspace"),
            self.name,
            place=self.workspace,
            verbose=True if shared.get("verbose") else False if shared.get("quiet") else None,
            dry_run=dry_run,
            as_json=as_json,
        ) as session:
            logs_training = "--logger" in self.options
            call = Call(session, settings, dry_run, as_json, logs_training)
            result = self.function(call, **values)
            if result is None:
                return
            if as_json:
                print(as_text(result.to_json()), file=session.output)
            else:
                call.show(result)
            result.raise_failures()


def _shared(
    device: Literal["cpu", "cuda"] | None = None,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE")] = None,
    workspace: Annotated[Path | None, typer.Option("--workspace", "-w")] = None,
    dry_run: bool = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False,
) -> None:
    """Have the options that commands share.

    Args:
        device: Where to train (default: as cluster.num_gpus says).
        set_: Change a setting: training.num_steps=500.
        workspace: Folder for all results (default: IIET_WORKSPACE, else ./iiet-workspace).
        dry_run: Print what would be done and what it takes; do nothing.
        as_json: Print JSON alone; docs/json.md names its keys.
        verbose: Show the output of libraries, too.
        quiet: Show no progress, only results and warnings.
    """


COMMANDS: dict[str, Command] = {}
"""All commands by name, in the order of `--help`."""


def build_app(word: str | None = None) -> typer.Typer:
    """Return the application; given a word, other commands than this have their names alone.

    To import the settings and to inspect the options of all commands would take longer than most
    commands do.
    """
    options: dict[str, Any] = {
        "no_args_is_help": True,
        "pretty_exceptions_enable": False,
        "rich_markup_mode": "rich",
        "context_settings": {"help_option_names": ["-h", "--help"]},
    }
    app = typer.Typer(
        name="iiet-orch",
        help="Pretrain, sweep and distill iterative Transformers; show accuracy against cost.",
        **options,
    )
    app.callback()(_options_of_all)
    config = typer.Typer(help="Show the settings, their schema, shipped sweeps.", **options)
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        is_built = word is None or word in (name, group)
        (config if group else app).command(
            last,
            rich_help_panel=None if group else command.group,
            context_settings=command.context_settings,
        )(command.build() if is_built else _named(command.text))
    app.add_typer(config, name="config", rich_help_panel="Settings")
    return app


def _named(text: str) -> Any:
    def command() -> None:
        raise AssertionError("only the command that is called is built")

    command.__doc__ = text
    return command


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"iiet-orch {installed_version('iiet-orch')}")
        raise typer.Exit


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


def as_text(value: Any) -> str:
    """Return a value as JSON text; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=2, default=str)


def read_schedules(texts: list[str]) -> list[int | str]:
    """Read a repeated `--schedule`: a number for all layers, or a text."""
    # A number of more digits is not a count; it stays a text, which the settings refuse.
    return [int(text) if re.fullmatch("[0-9]{1,9}", text) else text for text in texts]


def one_schedule(texts: list[str] | None) -> str | None:
    """Read the `--schedule` of a command that takes one.

    Raises:
        UserError: If it was given several times.
    """
    if texts and len(texts) > 1:
        raise UserError(
            f"--schedule was given {len(texts)} times ({' and '.join(texts)}), and this command "
            "takes one schedule; commas separate its layers"
        )
    return texts[0] if texts else None


def split_list(text: str) -> list[int | float | str]:
    """Read names or numbers with commas between them, also in brackets as in a settings file."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    return [_value(part.strip()) for part in text.split(",") if part.strip()]


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers from 1 on with commas between them, without repetitions.

    Raises:
        UserError: If one is not such a number; names the option.
    """
    found = split_list(text)
    numbers = [n for n in found if isinstance(n, int) and 1 <= n <= MAX_COUNT]
    if len(numbers) < len(found):
        raise UserError(
            f"{option} takes whole numbers from 1 to {MAX_COUNT} with commas between them; got "
            f"{quoted(text)}"
        )
    return tuple(dict.fromkeys(numbers))


def _read(
    config: str | None, changes: list[str], options: dict[str, Any], *, train_on: str | None
) -> Any:
    from orchestrator.settings import read_settings
    from orchestrator.settings.files import shipped_sweeps

    if config in shipped_sweeps() and Path(config).is_file():
        file = Path(config).absolute()
        typer.echo(f"settings: the file {file}, not the shipped sweep {config}", err=True)
    if train_on == "cpu":
        for option, key in (
            ("--gpus", "cluster.num_gpus"),
            ("--gpus-per-trial", "sweep.gpus_per_trial"),
        ):
            if number := options.get(key):
                raise UserError(f"--device cpu and {option} {number:g}: leave one out")
        options |= {"cluster.num_gpus": 0, "cluster.min_gpus": None, "sweep.gpus_per_trial": None}
    settings = read_settings(config or None, changes, options)
    if train_on == "cuda" and not settings.cluster.num_gpus:
        settings = read_settings(config or None, changes, options | {"cluster.num_gpus": 1})
    if settings.evaluation.include_path:
        from orchestrator.evaluation.selection import user_task_folders

        user_task_folders(settings.evaluation)
    return settings


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a function but its call; their help is in its docstring."""
    helps, parameters = _described(function)[1], []
    # The result's type takes time to import, and is not looked at.
    signature = inspect.signature(function, eval_str=True, locals={"Result": Any})
    for name, own in signature.parameters.items():
        kind, info = own.annotation, None
        if kind is Call:
            continue
        if get_origin(kind) is Annotated:
            kind, info = get_args(kind)
        elif own.default is False:  # A switch has no opposite.
            info = typer.Option(f"--{name.replace('_', '-')}")
        info = copy(info or typer.Option())  # Commands may share it.
        info.help = info.help or helps.pop(name)
        parameters.append(_parameter(name, own.default, Annotated[kind, info]))
    assert not helps, f"{function.__name__} has no parameters {[*helps]}"
    return parameters


def _described(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return a docstring without its `Args:`, and the text of each argument by name."""
    text, _, arguments = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")
    helps: dict[str, str] = {}
    for line in arguments.splitlines():
        if match := re.match(r" {4}(\w+): (.*)", line):
            name = match[1]
            helps[name] = match[2]
        else:
            helps[name] += f" {line.strip()}"
    return text, helps


def _option(flags: str, setting: Setting) -> Any:
    """Return the annotation of an option for a setting."""
    from orchestrator.settings import find_field

    found = find_field(setting.key)
    kind = setting.type or _plain_type(found.annotation)
    extras: dict[str, Any] = {}
    if kind is int:
        for bound in found.metadata:
            if hasattr(bound, "ge"):
                extras["min"] = bound.ge
            elif hasattr(bound, "gt"):
                extras["min"] = bound.gt + 1
    elif kind is tuple:
        kind, extras["metavar"] = str, "A,B,..."
    help_text = setting.help or " ".join((found.description or "").split())
    return Annotated[
        kind | None,
        typer.Option(
            *flags.split(","), help=help_text, show_default=False, hidden=setting.hidden, **extras
        ),
    ]


def _plain_type(annotation: Any) -> Any:
    """Return the type of an option: a choice, bool, int, float, tuple (with commas) or str."""
    origin, kinds = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain_type(kinds[0])
    if origin in (Literal, tuple, list):
        return annotation if origin is Literal else origin
    inner = [kind for kind in kinds if kind is not type(None)]
    if inner:
        return _plain_type(inner[0]) if len(inner) == 1 else str
    return annotation if annotation in METAVARS else str


def _converted(key: str, value: Any) -> Any:
    from orchestrator.settings import find_field

    return split_list(value) if _plain_type(find_field(key).annotation) is tuple else value


def _name(flags: str) -> str:
    return flags.split(",")[0].removeprefix("--").replace("-", "_")


def _value(text: str) -> int | float | str:
    """Return a number as a number, other texts as they are; the settings refuse what is wrong."""
    if re.fullmatch("-?[0-9]{1,18}", text):
        return int(text)
    try:
        return float(text) if re.fullmatch("[-+.0-9eE]{1,40}", text) else text
    except ValueError:
        return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and value - value != 0.0 else value
