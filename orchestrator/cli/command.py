"""`@Command`: a function and the settings that it takes become a command of `iiet-orch`.

A command's options are its own parameters (the `Args:` of its docstring are their help), then
settings by their key (type, range, choices and help are those of the field), then what commands
share. The function gets a `Call` and returns a plan or a result, which is printed here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from typer.core import TyperCommand
from typer.models import ArgumentInfo, OptionInfo

from orchestrator.cli.options import split_list
from orchestrator.cli.session import Call, WorkspaceUse
from orchestrator.workspace.errors import Interrupted
from orchestrator.workspace.provenance import installed_version

Function = TypeVar("Function", bound=Callable[..., Any])

METAVARS = {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH", list: "TEXT"}
"""Type of an option -> what the help says of its value. Typer would say more widely, or by Python's
name of the type."""
NO_COLOR = "--no-color"
Group = Literal["Start", "Train", "Sweep", "Measure", "See results", "Use models", "Keep order"]
"""Panels of `--help`: what a person wants to do, in this order."""
COMMANDS: dict[str, Command] = {}
"""All commands by name."""


class _PlainErrors(TyperCommand):
    """A command whose errors say what is wrong with a value without Python's exception."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


@dataclass
class Command:
    """A command; as a decorator, it makes one of a function and registers it."""

    name: str
    """A name with a space is a command of a group, `config show`."""
    _: KW_ONLY
    group: Group
    """Panel of `--help`."""
    options: Mapping[str, str] = field(default_factory=dict)
    """`--flag` or `--flag,-f` to the key of a setting."""
    config: Literal["option", "argument"] | None = None
    """Whether it reads a settings file, which `--config` or an argument of its own names."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Sections of the settings, and single settings of other sections, that it does not read ->
    what decides instead; see `Call.refuse_unread`."""
    workspace: WorkspaceUse | None = "made"
    """How the workspace is opened, see `open_session`; None if the command has none."""
    trains: bool = False
    """Whether it takes `--device cpu|cuda`, which says where to train."""
    plans: bool = False
    """Whether it takes `--dry-run`."""
    has_json: bool = True
    """Whether it takes `--json`."""

    def __call__(self, function: Function) -> Function:
        """Register the function as this command."""
        self.function = function
        self.text, _ = _split_docstring(function)
        COMMANDS[self.name] = self
        return function

    def build(self) -> Callable[..., None]:
        """Return a function that has all options in its signature, for Typer."""
        has_log = self.workspace in ("made", "read")
        shared = {
            "device": self.trains,
            "config": self.config == "option",
            "set_": self.config is not None,
            "workspace": self.workspace is not None,
            "dry_run": self.plans,
            "as_json": self.has_json,
            "verbose": has_log,
            "quiet": has_log,
        }
        parameters = [*_parameters(self.function)]
        parameters += [_setting_parameter(flags, key) for flags, key in self.options.items()]
        parameters += [option for option in _parameters(_shared) if shared[option.name]]
        run: Any = partial(self.run)
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run  # type: ignore[no-any-return]

    def run(self, **values: Any) -> None:
        """Call the function with the values of its parameters, and print what it returns."""
        settings = {option: values.pop(_name(option)) for option in self.options}
        shared = {name: values.pop(name) for name in SHARED if name in values}
        call = Call(self.name, self.workspace, shared, bool(self.options or self.config))
        for option, value in settings.items():
            key = self.options[option]
            is_list = isinstance(value, str) and _plain_type(_field(key).annotation) is tuple
            call.set(key, split_list(value) if is_list else value, option=option.split(",")[0])
        try:
            with call.stack:
                call.refuse_unread(self.unread)
                result = self.function(call, **values)
                if result is None:  # The function has printed something itself.
                    return
                if call.as_json:
                    print(result.to_text(), file=call.session.output)
                else:
                    call.show(result)
                result.raise_failures()
        except (KeyboardInterrupt, typer.Abort):  # The latter at a prompt.
            raise Interrupted from None


def _shared(
    device: Literal["cpu", "cuda"] | None = None,
    config: Annotated[str | None, typer.Option("--config", "-c")] = None,
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
        config: Settings: a YAML file, or the name of a shipped sweep.
        set_: Change a setting: training.num_steps=500.
        workspace: Folder for all results (default: IIET_WORKSPACE, else ./iiet-workspace).
        dry_run: Print what would be done and what it takes; do nothing.
        as_json: Print JSON alone; the reference of the commands names its keys.
        verbose: Show the output of libraries, too.
        quiet: Show no progress, only results and warnings.
    """


SHARED = tuple(inspect.signature(_shared).parameters)


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
    text = "Pretrain, sweep and distill iterative Transformers; show accuracy against cost."
    app = typer.Typer(name="iiet-orch", help=text, **options)
    app.callback()(_options_of_all)
    config = typer.Typer(help="Write and show settings; list the shipped sweeps.", **options)
    panels = get_args(Group)

    def panel_first(item: tuple[str, Command]) -> tuple[int, bool]:
        """Order commands by their panels, `quickstart` before the others of its panel."""
        name, command = item
        return panels.index(command.group), name != "quickstart"

    for name, command in sorted(COMMANDS.items(), key=panel_first):
        group, _, last = name.rpartition(" ")
        is_built = word is None or word in (name, group)
        (config if group else app).command(
            last,
            cls=_PlainErrors,
            help=command.text,
            rich_help_panel=None if group else command.group,
        )(command.build() if is_built else lambda: None)
    app.add_typer(config, name="config", rich_help_panel="Start")
    return app


def _print_version(is_given: bool) -> None:
    if is_given:
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


def _split_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return a docstring without its `Args:`, and the text of each argument by name."""
    description = inspect.cleandoc(function.__doc__ or "").partition("\n\nKeys:\n")[0]
    text, _, arguments = description.partition("\n\nArgs:\n")
    # A name and the lines of its text in turn.
    parts = re.split(r"^ {4}(\w+): ", arguments, flags=re.MULTILINE)[1:]
    names = parts[::2]
    texts = [" ".join(lines.split()) for lines in parts[1::2]]
    return text, dict(zip(names, texts, strict=True))


def _parameters(function: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    """Yield the parameters of a function but its call, for Typer."""
    _, helps = _split_docstring(function)
    # The result's type takes time to import, and is not looked at.
    signature = inspect.signature(function, eval_str=True, locals={"Result": Any})
    for name, parameter in signature.parameters.items():
        if parameter.annotation is not Call:
            yield _parameter(name, parameter.default, parameter.annotation, helps.get(name))


def _field(key: str) -> Any:
    from orchestrator.settings import find_field  # Commands without settings do not import them.

    return find_field(key)


def _setting_parameter(flags: str, key: str) -> inspect.Parameter:
    """Return the parameter of an option that changes a setting."""
    field = _field(key)
    value_type = _plain_type(field.annotation)
    limits = field.metadata if value_type is int else ()
    info = typer.Option(*flags.split(","), show_default=False)
    if value_type is tuple:  # `Command.run` splits the text.
        value_type = str
        info.metavar = "A,B,..."
    text = " ".join((field.description or "").split())
    return _parameter(_name(flags), None, value_type | None, text, info, *limits)


def _parameter(
    name: str, default: Any, annotation: Any, text: str | None = None, *metadata: Any
) -> inspect.Parameter:
    """Return a parameter for Typer, with the option among its metadata, or one of its name."""
    value_type = annotation
    if get_origin(annotation) is Annotated:
        value_type, *own_metadata = get_args(annotation)
        metadata = (*own_metadata, *metadata)
    infos = [item for item in metadata if isinstance(item, OptionInfo | ArgumentInfo)]
    if infos:
        info = copy(infos[0])  # Commands may share it.
    elif default is False:
        # With a name of its own, a switch has no opposite such as `--no-dry-run`.
        info = typer.Option(f"--{name.replace('_', '-')}")
    else:
        info = typer.Option()
    info.help = info.help or text
    for limit in metadata:
        if hasattr(limit, "gt"):  # A field of whole numbers has it.
            info.min = limit.gt + 1
        info.min = getattr(limit, "ge", info.min)
        info.max = getattr(limit, "le", info.max)
    plain_type = _plain_type(value_type)
    if isinstance(info, OptionInfo) and info.metavar is None:
        info.metavar = METAVARS.get(plain_type, "CHOICE")
        if get_origin(plain_type) is Literal:
            info.help = f"{', '.join(get_args(plain_type))}. {info.help or ''}"
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[value_type, info],
    )


def _plain_type(annotation: Any) -> Any:
    """Return the type of an option: a choice, bool, int, float, list, tuple or str."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return _plain_type(arguments[0])
    if origin is Literal:
        return annotation
    if origin in (tuple, list):
        return origin
    # What is left with arguments is a union. One of several types is typed as text.
    members = [member for member in arguments if member is not type(None)]
    if members:
        return _plain_type(members[0]) if len(members) == 1 else str
    return annotation if annotation in METAVARS else str


def _name(flags: str) -> str:
    return flags.split(",")[0].removeprefix("--").replace("-", "_")
