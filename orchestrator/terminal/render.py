"""Numbers, lines and tables for people, in the width that the terminal has.

A percent sign follows its number without a space, as in `f"{share:.0%}"`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from iiet.model.schedule import IterationSchedule

BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """Format a number with its noun: `1 trial`, `1,234 trials`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def format_bytes(value: float) -> str:
    """Format bytes with three digits: `512 B`, `1.5 GiB`."""
    for unit in BYTE_UNITS[:-1]:
        if value < 999.5:  # From there on, three digits would round to 1e+03.
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} {BYTE_UNITS[-1]}"


def format_byte_parts(parts: Mapping[str, int]) -> str:
    """Format the parts of a sum of bytes: `checkpoints 1.0 GiB, tokens 3.0 MiB`."""
    return ", ".join(f"{name} {format_bytes(value)}" for name, value in parts.items())


def format_parameters(count: float) -> str:
    """Format a number of parameters in thousands, millions or billions: `1.48 M`, `1.34 B`."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} K"


def format_number(value: float) -> str:
    """Format a number: without decimals from 1,000 on, else with up to two."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}".rstrip("0").rstrip(".")


def format_duration(seconds: float) -> str:
    """Format a duration in the largest unit that fits: `12 s`, `2.5 min`, `1.5 h`, `3 days`."""
    # Unit, from how many seconds on it is used (two days are "48 h"), and its seconds.
    units = (("days", 48 * 3600, 24 * 3600), ("h", 3600, 3600), ("min", 60, 60), ("s", 0, 1))
    unit, size = next((unit, size) for unit, least, size in units if seconds >= least)
    number = seconds / size
    return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def format_duration_range(least: float, most: float) -> str:
    """Format a range of seconds: `2 to 3 h`, `30 min to 2 h`."""
    shortest = format_duration(least)
    longest = format_duration(most)
    if shortest == longest:
        return shortest
    number, unit = shortest.split(" ", 1)
    if longest.endswith(f" {unit}"):
        return f"{number} to {longest}"
    return f"{shortest} to {longest}"


def join_names(names: Sequence[str]) -> str:
    """Join names by commas, or by semicolons if a name (such as a schedule) contains a comma."""
    return ("; " if any("," in name for name in names) else ", ").join(names)


def shortest_schedule(schedule: Sequence[int]) -> str:
    """Write a schedule as short as it can be typed: `3` (all layers), `2*4,0*20`, `2,x,0`."""
    if len(set(schedule)) == 1:
        return str(schedule[0])
    parsed = IterationSchedule(tuple(schedule))
    return min(",".join(map(str, parsed.as_list())), parsed.with_repetitions(), key=len)


def scale_and_digits(value: float, *, is_percent: bool) -> tuple[float, int]:
    """Return the factor and the number of decimals that a number is printed with."""
    return (100.0, 1) if is_percent else (1.0, 3 if abs(value) < 10 else 1)


def format_with_error(value: float, error: float | None, *, is_percent: bool) -> str:
    """Write a number with its standard error: `44.4 ± 1.2`; a share in percent without the sign."""
    scale, digits = scale_and_digits(value, is_percent=is_percent)
    text = f"{scale * value:.{digits}f}"
    return text if not error else f"{text} ± {scale * error:.{digits}f}"


def print_line(console: Console, line: str | Text) -> None:
    """Print a line, folded between words on a terminal, unfolded elsewhere.

    A word that is too long for the terminal, such as a path, stays whole, so that it can be copied.
    """
    line = line if isinstance(line, Text) else Text(line)
    parts = _folded(line, console.width) if console.is_terminal else [line]
    for part in parts:
        console.print(part, highlight=False, soft_wrap=True)


def _folded(line: Text, width: int) -> list[Text]:
    # Rich's own wrapping would break long words. `textwrap` knows no styles, so each part is cut
    # out of the styled line: by its place in the text, which is searched for from `end` on.
    parts = []
    end = 0
    # A number and its error stay together, as in `44.5 ± 1.2%`.
    text = re.sub(" (?=± )|(?<=±) ", "\u00a0", line.plain)
    for paragraph in text.split("\n"):
        indent = " " * (len(paragraph) - len(paragraph.lstrip(" ")))
        wrapped = textwrap.wrap(
            paragraph,
            width,
            subsequent_indent=indent,
            expand_tabs=False,
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for number, part in enumerate(wrapped or [""]):
            added_indent = indent if number else ""
            start = text.index(part.removeprefix(added_indent), end)
            end = start + len(part) - len(added_indent)
            parts.append(Text(added_indent) + line[start:end])
    return parts
