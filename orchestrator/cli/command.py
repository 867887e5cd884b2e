"""`@Command`: a function and the settings that it takes become a command of `iiet-orch`.

A command's options are its own parameters (the `Args:` of its docstring are their help; those of a
pydantic model are its fields), then settings by their key (type, range, choices and help are those
of the field), then what commands share: settings file, `--set`, workspace, `--dry-run`, `--json`,
`--quiet`. The function gets a `Call` and returns a plan or a result, which is printed here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from typer.models import ArgumentInfo, OptionInfo

from orchestrator.cli.options import read_settings_of, split_list
from orchestrator.cli.session import Place, Session, Warnings, open_session
from orchestrator.workspace.provenance import installed_version

if TYPE_CHECKING:
    from orchestrator.pipelines.context import Context
    from orchestrator.pipelines.result import Result

Function = TypeVar("Function", bound=Callable[..., Any])

METAVARS = {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH", list: "TEXT"}
"""What the help says of an option's type; Typer's own are wide, and Python's names."""
NO_COLOR = "--no-color"
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


@dataclass(frozen=True, kw_only=True)
class Call(Session):
    """What a command works with."""

    settings: Any
    """The resolved settings, if the command has options that are settings."""
    dry_run: bool
    as_json: bool

    @property
    def common(self) -> dict[str, Any]:
        """The keyword arguments that every function of pipelines takes."""
        return {"workspace": self.workspace, "progress": self.progress}

    @cached_property
    def context(self) -> Context:
        """What a pipeline runs in, the same at each use."""
        from orchestrator.pipelines.context import Context

        return Context(self.workspace, self.progress)

    def finish(self, plan: Any, run: Callable[[Any, Context], Result]) -> Result:
        """Return a plan for a dry run, else what it gives."""
        return plan if self.dry_run else run(plan, self.context)

    def imported(self, model: Path | None) -> Path | None:
        """Return a model as it is named in the workspace; one of the hub is imported first."""
        from orchestrator.pipelines.models import local_model

        return model if self.dry_run else local_model(model, **self.common)

    def show(self, result: Result) -> None:
        """Print what a terminal shows of a result."""
        from orchestrator.pipelines.result import show

        show(result, self.console)

    def answer(self, values: dict[str, Any], lines: list[Any]) -> Result:
        """Return a result of a few values and lines."""
        from orchestrator.pipelines.result import Answer

        return Answer(values=values, lines=lines)

    @property
    def is_quiet(self) -> bool:
        """Whether the user wants results and warnings only."""
        return isinstance(self.progress, Warnings)


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
        self.models = {
            name: own.annotation
            for name, own in _signature(self.function).items()
            if hasattr(own.annotation, "model_fields")
        }
        parameters = [*_parameters(self.function)]
        parameters += [_of_setting(flags, setting) for flags, setting in self.settings.items()]
        if self.config is not None:
            parameters.append(_parameter("config", self.config_default, self.config))
        parameters += [shared for shared in _parameters(_shared) if shared.name in self.shared]

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
        for name, model in self.models.items():
            values[name] = model(**{own: values.pop(own) for own in model.model_fields})
        as_json, dry_run = shared.get("as_json", False), shared.get("dry_run", False)
        with open_session(
            shared.get("workspace"),
            self.name,
            place=self.workspace,
            verbose=True if shared.get("verbose") else False if shared.get("quiet") else None,
            dry_run=dry_run,
            as_json=as_json,
        ) as session:
            call = Call(**vars(session), settings=settings, dry_run=dry_run, as_json=as_json)
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


def _named(text: str) -> Callable[[], None]:
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


# Options from parameters, from the fields of a model, and from settings


def _signature(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    # The result's type takes time to import, and is not looked at.
    found = inspect.signature(function, eval_str=True, locals={"Result": Any})
    return {name: own for name, own in found.parameters.items() if own.annotation is not Call}


def _described(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return a docstring without its `Args:`, and the text of each argument by name."""
    text, _, arguments = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")
    parts = re.split(r"^ {4}(\w+): ", arguments, flags=re.MULTILINE)[1:]
    names = parts[::2]
    return text, dict(zip(names, (" ".join(part.split()) for part in parts[1::2]), strict=True))


def _parameters(function: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    """Yield the parameters of a function but its call, with the fields of those that are models."""
    helps = _described(function)[1]
    for name, own in _signature(function).items():
        if model := getattr(own.annotation, "model_fields", None):
            for field_name, found in model.items():
                text = " ".join((found.description or "").split())
                kind = found.annotation
                yield _parameter(field_name, found.default, kind, text, *found.metadata)
        else:
            yield _parameter(name, own.default, own.annotation, helps.get(name))


def _of_setting(flags: str, setting: Setting) -> inspect.Parameter:
    from orchestrator.settings import find_field

    found = find_field(setting.key)
    kind = setting.type or _plain_type(found.annotation)
    limits = found.metadata if kind is int else ()
    info = typer.Option(*flags.split(","), show_default=False, hidden=setting.hidden)
    if kind is tuple:
        kind, info.metavar = str, "A,B,..."
    text = setting.help or " ".join((found.description or "").split())
    return _parameter(_name(flags), None, kind | None, text, info, *limits)


def _parameter(
    name: str, default: Any, kind: Any, text: str | None = None, *metadata: Any
) -> inspect.Parameter:
    """Return a parameter for Typer, with the option among its metadata, or one of its name."""
    if get_origin(kind) is Annotated:
        kind, *own = get_args(kind)
        metadata = (*own, *metadata)
    found = [each for each in metadata if isinstance(each, OptionInfo | ArgumentInfo)]
    # A switch has no opposite, unless its own option says so.
    flags = [f"--{name.replace('_', '-')}"] if default is False else []
    info = copy(found[0]) if found else typer.Option(*flags)  # Commands may share it.
    info.help = info.help or text
    for limit in metadata:
        if hasattr(limit, "gt"):  # Of whole numbers.
            info.min = limit.gt + 1
        info.min = getattr(limit, "ge", info.min)
        info.max = getattr(limit, "le", info.max)
    plain = _plain_type(kind)
    if isinstance(info, OptionInfo) and info.metavar is None:
        info.metavar = METAVARS.get(plain, "CHOICE")
        if get_origin(plain) is Literal:
            info.help = f"{', '.join(get_args(plain))}. {info.help or ''}"
    only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, only, default=default, annotation=Annotated[kind, info])


def _plain_type(annotation: Any) -> Any:
    """Return the type of an option: a choice, bool, int, float, list, tuple or str."""
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
