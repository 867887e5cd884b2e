"""What a shell offers after Tab: models and sweeps of the workspace, shipped sweeps, settings.

The functions get the command as far as it is typed. They never fail: a shell would show the error
in the middle of the command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from orchestrator.workspace.errors import UserError

if TYPE_CHECKING:
    from orchestrator.workspace.layout import Workspace

METHODS = (
    *("vanilla", "iiet", "pcformer", "pcformer_rk4"),
    *("ode_rk2", "ode_rk4", "ode_rk2_gated", "looped"),
)
"""Methods of this program; importing them would import PyTorch. Other packages may add more."""
INFLUENCE_METRICS = ("cosine", "relative", "loss")
"""Influence metrics of this program; likewise."""


def complete_models(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the runs of the workspace; with `RUN/` typed, its checkpoints."""
    from orchestrator.workspace.layout import find_checkpoints

    names: list[str] = []
    for workspace in _workspace(ctx):
        for run in workspace.runs.glob("*"):
            if saved := find_checkpoints(run):
                is_open = incomplete.startswith(f"{run.name}/")
                names += [f"{run.name}/{path.name}" for path in saved] if is_open else [run.name]
    return _beginning_with(incomplete, names)


def complete_sweeps(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the sweeps of the workspace."""
    return _beginning_with(
        incomplete, [path.name for space in _workspace(ctx) for path in space.sweeps.glob("*")]
    )


def complete_settings_files(incomplete: str) -> list[str]:
    """Offer the shipped sweeps; a shell adds files where none of them fits."""
    from orchestrator.settings.shipped import shipped_sweeps

    return _beginning_with(incomplete, shipped_sweeps())


def complete_settings(incomplete: str) -> list[str]:
    """Offer the settings of `--set`, section by section."""
    from orchestrator.settings import Settings

    return _beginning_with(incomplete, [f"{name}=" for name in _names(Settings)])


def complete_methods(incomplete: str) -> list[str]:
    """Offer the methods, those of other packages among them."""
    return _beginning_with(incomplete, _all_methods())


def complete_method_list(incomplete: str) -> list[str]:
    """Offer the next method of a list with commas."""
    return _next_of(incomplete, _all_methods())


def complete_metrics(incomplete: str) -> list[str]:
    """Offer the influence metrics, those of other packages among them."""
    return _beginning_with(incomplete, [*INFLUENCE_METRICS, *_added("iiet.influence_metrics")])


def list_completer(names: Sequence[str], *, group: str | None = None) -> Callable[[str], list[str]]:
    """Return a function that offers the next of these names in a list with commas.

    Args:
        group: Entry points by which other packages add names.
    """

    def complete(incomplete: str) -> list[str]:
        return _next_of(incomplete, [*names, *(_added(group) if group else ())])

    return complete


def _next_of(incomplete: str, names: Sequence[str]) -> list[str]:
    typed, comma, last = incomplete.rpartition(",")
    taken = typed.split(",")
    return [f"{typed}{comma}{n}" for n in _beginning_with(last, names) if n not in taken]


def _all_methods() -> list[str]:
    return [*METHODS, *_added("iiet.methods")]


def _added(group: str) -> list[str]:
    return sorted(entry.name for entry in entry_points(group=group))


def _beginning_with(incomplete: str, names: Any) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))


def _workspace(ctx: typer.Context) -> Iterator[Workspace]:
    """Yield the workspace that is named so far, or the default one, if it can be read."""
    from orchestrator.workspace.layout import locate_workspace

    named = ctx.params.get("workspace")
    with suppress(UserError, OSError):
        yield locate_workspace(Path(named) if named else None)


def _names(section: Any) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from (f"{name}.{inner}" for inner in _names(field.annotation))
        else:
            yield name
