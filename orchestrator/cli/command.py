"""`@Command`: a function and the settings that it takes become a command of `iiet-orch`.

A command's options are its own parameters (the `Args:` of its docstring are their help), then
settings by their key (type, range, choices and help are those of the field), then what commands
share: settings file, `--set`, workspace, `--dry-run`, `--json`, `--quiet`. The function gets a
`Call` and returns a plan or a result, which is printed here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from typer.models import OptionInfo as Option

from orchestrator.cli.options import read_settings_of, split_list
from orchestrator.cli.session import Place, Session, Warnings, open_session

if TYPE_CHECKING:
    from orchestrator.pipelines.context import Context
    from orchestrator.pipelines.result import Result

Function = TypeVar("Function", bound=Callable[..., Any])

METAVARS = {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH", list: "TEXT"}
"""What the help says of an option's type; Typer's own are wide, and Python's names."""
COMMANDS: dict[str, Command] = {}
"""All commands by name, in the order of `--help`."""


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
        self.function, (self.text, _) = function, _described(function)
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
            settings = read_settings_of(config, changes, options, train_on=shared.get("device"))
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
                print(result.to_text(), file=session.output)
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
    parts = re.split(r"^ {4}(\w+): ", arguments, flags=re.MULTILINE)[1:]
    helps = {
        name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)
    }
    return text, helps


def _option(flags: str, setting: Setting) -> Any:
    """Return the annotation of an option for a setting."""
    from orchestrator.settings import find_field

    found = find_field(setting.key)
    kind, extras = setting.type or _plain_type(found.annotation), dict[str, Any]()
    if kind is int:
        for bound in found.metadata:
            if hasattr(bound, "ge"):
                extras["min"] = bound.ge
            elif hasattr(bound, "gt"):
                extras["min"] = bound.gt + 1
    elif kind is tuple:
        kind, extras["metavar"] = str, "A,B,..."
    text = setting.help or " ".join((found.description or "").split())
    info = typer.Option(
        *flags.split(","), help=text, show_default=False, hidden=setting.hidden, **extras
    )
    return Annotated[kind | None, info]


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
