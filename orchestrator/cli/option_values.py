"""Read the values of options: the settings, and lists of numbers, names and schedules."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import typer

from orchestrator.cli.options import MAX_COUNT, MAX_SEED
from orchestrator.workspace.errors import UserError, quoted


def read_options(
    config: str | None,
    assignments: list[str] | None,
    *,
    train_on: str | None = None,
    **options: Any,
) -> Any:
    """Read the settings: file, then --set, then the command's own options.

    Args:
        train_on: The `--device` of a command that trains.
        **options: `section__key` to the option's value; None means that it was not given.

    Raises:
        UserError: Names everything that is wrong.
    """
    from orchestrator.settings import read_settings
    from orchestrator.settings.files import shipped_sweeps

    if config in shipped_sweeps() and Path(config).is_file():
        file = Path(config).absolute()
        typer.echo(f"settings: the file {file}, not the shipped sweep {config}", err=True)
    given = {name.replace("__", "."): value for name, value in options.items() if value is not None}
    if train_on == "cpu":
        for option, key in (
            ("--gpus", "cluster.num_gpus"),
            ("--gpus-per-trial", "sweep.gpus_per_trial"),
        ):
            if number := given.get(key):
                raise UserError(f"--device cpu and {option} {number:g}: leave one out")
        given |= {"cluster.num_gpus": 0, "cluster.min_gpus": None, "sweep.gpus_per_trial": None}
    settings = read_settings(config or None, assignments or [], given)
    if train_on == "cuda" and not settings.cluster.num_gpus:
        given["cluster.num_gpus"] = 1
        settings = read_settings(config or None, assignments or [], given)
    if settings.evaluation.include_path:
        from orchestrator.evaluation.task_selection import user_task_folders

        user_task_folders(settings.evaluation)
    return settings


def parse_numbers(text: str | None, option: str) -> list[float] | None:
    """Read comma-separated numbers; None stays None.

    Raises:
        UserError: If one is not a number; names the option.
    """
    if text is None:
        return None
    try:
        found = [float(part) for part in _number_texts(text)]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UserError(f"{option} takes numbers with commas between them; got {quoted(text)}")
    return found


def parse_rates(text: str | None) -> dict[str, list[float]] | None:
    """Read `--rates`: the same learning rates for every method; None stays None."""
    from iiet.methods import METHODS

    rates = parse_numbers(text, "--rates")
    return None if rates is None else dict.fromkeys(METHODS, rates)


def parse_whole_numbers(
    text: str | None, option: str, *, at_least: int = 1, at_most: int = MAX_COUNT
) -> tuple[int, ...] | None:
    """Read comma-separated whole numbers, without repetitions; None stays None.

    Raises:
        UserError: If one is not a whole number or out of range; names the option.
    """
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in _number_texts(text))
    except ValueError:
        found = (at_least - 1,)
    if min(found) < at_least or max(found) > at_most:
        raise UserError(
            f"{option} takes whole numbers from {at_least} to {at_most} with commas between them; "
            f"got {quoted(text)}"
        )
    return tuple(dict.fromkeys(found))


def parse_seeds(text: str | None) -> tuple[int, ...] | None:
    """Read `--seeds`; None stays None."""
    return parse_whole_numbers(text, "--seeds", at_least=0, at_most=MAX_SEED)


def split_names(text: str | None) -> list[str | int] | None:
    """Read comma-separated names or numbers; None stays None."""
    if text is None:
        return None
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):  # As in a settings file.
        text = text[1:-1]
    names = [part.strip() for part in text.split(",") if part.strip()]
    return [*map(_count_or_text, names)]


def parse_schedules(texts: list[str] | None) -> list[str | int] | None:
    """Read a repeated `--schedule`: a number for all layers, or a text; None stays None."""
    return None if texts is None else [*map(_count_or_text, texts)]


def one_schedule(schedules: list[str] | None) -> str | None:
    """Read a `--schedule` of a command that takes one.

    Raises:
        UserError: If it was given several times.
    """
    if schedules and len(schedules) > 1:
        raise UserError(
            f"--schedule was given {len(schedules)} times ({' and '.join(schedules)}), and this "
            "command takes one schedule; commas separate its layers"
        )
    return schedules[0] if schedules else None


def _count_or_text(text: str) -> int | str:
    # A number of more digits is not a count; it stays a text, which the settings refuse.
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else text


def _number_texts(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    # Only Python reads `1_0` as a number.
    if not all(re.fullmatch("[-+.0-9eE]{1,40}", part) for part in found):
        raise ValueError(text)
    return found
