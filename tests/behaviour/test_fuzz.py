"""Fuzzing: with any settings, options and settings files, a command ends with one sentence.

There must be no traceback and no hang. Runs by hand (`make test-long`), for some minutes. All
findings are collected and reported together. Damaged files have a table: test_damage.py.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import traceback
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from commands import settings_options
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small_size import SMALL

from orchestrator import cli
from orchestrator.settings import Section, Settings

NUM_EXAMPLES = int(os.environ.get("IIET_FUZZ_SETTINGS", 1000))
SECONDS_BEFORE_IT_HANGS = 60
LONGEST_ANSWER = 20_000
OPTIONS = settings_options(SMALL)


class Hangs(BaseException):
    """Raised by the alarm; no command catches it."""


def ask(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int | str, str]:
    """Run a command in this process; return its exit code, or how it ended, and what it printed."""

    def give_up(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_BEFORE_IT_HANGS)
    error = ""
    try:
        ended: int | str = cli.main(arguments)
    except (Hangs, Exception) as caught:
        ended, error = type(caught).__name__, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    captured = capfd.readouterr()
    return ended, captured.out + captured.err + error


def finding(ended: int | str, printed: str) -> str:
    """Return what is wrong with an answer, as a kind; empty if nothing is."""
    if "The traceback is in" in printed:
        log = Path(printed.partition("The traceback is in ")[2].strip())
        printed += log.read_text() if log.is_file() else ""
    # The last line of our code in a traceback distinguishes findings.
    places = re.findall(r'File ".*?/(?:orchestrator|iiet)/(\S+\.py)", line (\d+)', printed)
    if ended not in (0, 1, 2) or "Traceback" in printed:
        return f"{ended} at {':'.join(places[-1]) if places else '?'}"
    return "too long an answer" if len(printed) > LONGEST_ANSWER else ""


def _names(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, described in section.model_fields.items():
        kind = described.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _names(kind, f"{prefix}{name}.")
        yield prefix + name


NAMES = sorted(_names(Settings))

WORDS = st.text(max_size=20) | st.sampled_from(
    ["", "on", "017", "1:30", "²", "1e999", "nan", ".inf", "~", "2026-02-30", "0x", "heldout", "-1"]
)
NUMBERS = (
    st.integers(-3, 5)
    | st.integers()
    | st.floats()
    | st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, 1e-320])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
SOUP = st.text(alphabet="[]{}&*:-!|>%@`\"'#,?\n\t 019.eExy~<=²\x00\u2028", max_size=60)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """A tree of settings: known names with any values, and a few unknown ones."""
    tree: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=4)):
        *sections, last = name.split(".")
        at = tree
        for section in sections:
            if not isinstance(at.get(section), dict):
                at[section] = {}
            at = at[section]
        at[last] = draw(VALUES)
    if draw(st.booleans()):
        tree[draw(WORDS)] = draw(VALUES)
    return tree


ASSIGNMENTS = st.builds(
    "{}={}".format, st.sampled_from(NAMES) | WORDS, SOUP | VALUES.map(str) | WORDS
)


def _sound(annotation: Any) -> list[str]:
    """Return valid values of a setting, and some that only its limits refuse."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [str(value) for value in inner]
    if get_origin(annotation) is tuple:
        return ["[]", *(f"[{a}, {b}]" for a, b in pairwise(_sound(inner[0])))]
    if get_origin(annotation) is dict:
        return ["{vanilla: 1e-3}", "{iiet: [1e-3, 2e-3]}", "{r = 1: 0.1}"]
    if inner:
        return [value for part in inner for value in _sound(part)]
    return {
        bool: ["true", "false"],
        int: ["0", "1", "2", "3", "5", "64", "100", "1000", "1000000", "1000000000"],
        float: ["0", "0.1", "0.5", "0.99", "1", "1.5", "1e-3", "1e9"],
        str: ["iiet", "vanilla", "pcformer", "tiny", "55m", "3..0", "heldout", "x"],
    }.get(annotation, ["~"])


@st.composite
def sound_assignments(draw: st.DrawFn) -> str:
    """A setting with a value of its type, so that later checks are tested, too."""
    name = draw(st.sampled_from(NAMES))
    section: Any = Settings
    for part in name.split("."):
        annotation = section.model_fields[part].annotation
        section = annotation
    return f"{name}={draw(st.sampled_from(_sound(annotation)))}"


PLANS = st.sampled_from(
    ["pretrain", "sweep-threshold", "sweep-iterations", "sweep-threshold --search 2", "sweep toy"]
)
SCHEDULES = st.text(alphabet="0123456789,.*()[] -²", max_size=12) | WORDS
LISTS = st.text(alphabet="0123456789,.-+eEnaif² ", max_size=12) | WORDS
PRETRAIN, GENERATE, SWEEP = "pretrain --dry-run", "generate -p a -n 2", "sweep-threshold --dry-run"
TAKEN = (
    (PRETRAIN, SCHEDULES, ("--schedule",)),
    (PRETRAIN, LISTS, ("--steps", "--workers", "--mfu")),
    (PRETRAIN, WORDS, ("--preset", "--method", "--storage", "--name")),
    (GENERATE, SCHEDULES, ("--schedule",)),
    (GENERATE, LISTS, ("--seed", "--top-p", "--top-k", "--temperature")),
    (GENERATE, WORDS, ("--prompt", "--stop")),
    (SWEEP, LISTS, ("--thresholds", "--budgets", "--seeds")),
    (SWEEP, WORDS, ("--cost", "--name")),
    ("pick --dry-run", LISTS, ("--keep", "--budget", "--confidence")),
    ("pick --dry-run", WORDS, ("--cost",)),
)
"""A command, values, and options that may get them."""
NAMED = ("report", "pick --dry-run", "evaluate", "generate -p a", "prepare", "export", "import")
"""Commands that take a name or a path."""


def _argument(text: str) -> str:
    """Return text that a command line can pass on: no NUL."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


@st.composite
def questions(draw: st.DrawFn) -> tuple[list[str], str | bytes | None]:
    """A command that trains nothing, and the content of the file `FILE` in its arguments."""
    kind = draw(st.sampled_from(["file", "set", "set", "plausible", "plausible", "option", "name"]))
    if kind == "file":
        content = draw(trees().map(yaml.dump) | SOUP | st.binary(max_size=60))
        return ["pretrain", "--dry-run", "--config", "FILE"], content
    if kind == "set":
        several = draw(st.lists(ASSIGNMENTS, min_size=1, max_size=3))
        return ["pretrain", "--dry-run", *(f"--set={_argument(text)}" for text in several)], None
    if kind == "plausible":
        several = draw(st.lists(sound_assignments(), min_size=1, max_size=2))
        changes = [f"--set={text}" for text in several]
        return [*draw(PLANS).split(), "--dry-run", *OPTIONS, *changes], None
    if kind == "option":
        command, values, options = draw(st.sampled_from(TAKEN))
        small = OPTIONS if command == SWEEP else []
        option = f"{draw(st.sampled_from(options))}={_argument(draw(values))}"
        return [*command.split(), *small, option], None
    return [*draw(st.sampled_from(NAMED)).split(), "--", _argument(draw(WORDS | SOUP))], None


@pytest.mark.long
def test_settings_files_and_options(
    small_sweep: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    findings: dict[str, str] = {}
    workspace = shutil.copytree(small_sweep, tmp_path / "space")
    file = tmp_path / "s.yaml"
    monkeypatch.chdir(tmp_path)

    @settings(
        deadline=None,
        database=None,
        phases=[Phase.generate],  # Findings are collected; minimizing each would take too long.
        suppress_health_check=list(HealthCheck),
        max_examples=NUM_EXAMPLES,
    )
    @given(questions())
    def each(question: tuple[list[str], str | bytes | None]) -> None:
        (name, *words), content = question
        if content is not None:
            data = content.encode("utf-8", "replace") if isinstance(content, str) else content
            file.write_bytes(data)
        words = [str(file) if word == "FILE" else word for word in words]
        ended, printed = ask(capfd, [name, "--workspace", str(workspace), *words])
        if kind := finding(ended, printed):
            findings.setdefault(kind, f"{name} {words} {content!r}\n{printed[-1500:]}")

    each()
    assert not findings, "\n\n".join(f"### {kind}: {text}" for kind, text in findings.items())
