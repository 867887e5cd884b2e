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
from pathlib import Path

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


def names_of(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the names of all settings and sections."""
    for name, described in section.model_fields.items():
        kind = described.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from names_of(kind, f"{prefix}{name}.")
        yield prefix + name


NAMES = st.sampled_from(sorted(names_of(Settings)))
WORDS = st.text(max_size=20) | st.sampled_from(
    ["", "on", "017", "1:30", "²", "1e999", "nan", ".inf", "~", "2026-02-30", "0x", "heldout", "-1"]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**31, 2**32, 2**64, 10**30, 1e-320])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
SOUP = st.text(alphabet="[]{}&*:-!|>%@`\"'#,?\n\t 019.eExy~<=²\x00\u2028", max_size=60)
PLAUSIBLE = st.sampled_from(
    ["true", "0", "1", "2", "5", "64", "1000", "1000000000", "0.5", "1e-3", "1e9", "[]", "[1, 2]",
     "[0.5, 2]", "{vanilla: 1e-3}", "{iiet: [1e-3, 2e-3]}", "iiet", "vanilla", "looped", "pcformer",
     "tiny", "55m", "3..0", "heldout", "bf16", "fsdp", "search", "iterations", "x", "~"]
)  # fmt: skip
SCHEDULES = st.text(alphabet="0123456789,.*()[] -²", max_size=12) | WORDS
LISTS = st.text(alphabet="0123456789,.-+eEnaif² ", max_size=12) | WORDS
PRETRAIN = "pretrain --dry-run"
GENERATE = "generate -p a -n 2"
SWEEP = "sweep-threshold --dry-run"
PLANS = st.sampled_from(
    [PRETRAIN, SWEEP, f"{SWEEP} --search 2", "sweep-iterations --dry-run", "sweep toy --dry-run"]
)
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


@st.composite
def questions(draw: st.DrawFn) -> tuple[list[str], str | bytes | None]:
    """A command that trains nothing, and the content of the file `FILE` in its arguments."""
    kind = draw(st.sampled_from(["file", "set", "set", "plausible", "plausible", "option", "name"]))
    if kind == "file":
        trees = st.dictionaries(st.sampled_from(sorted(Settings.model_fields)) | WORDS, VALUES)
        content = draw(trees.map(yaml.dump) | SOUP | st.binary(max_size=60))
        return [*PRETRAIN.split(), "--config", "FILE"], content
    if kind in ("set", "plausible"):
        values = PLAUSIBLE if kind == "plausible" else SOUP | VALUES.map(str) | WORDS
        changes = draw(st.lists(st.tuples(NAMES | WORDS, values), min_size=1, max_size=3))
        changed = [f"--set={name}={value}" for name, value in changes]
        words = draw(PLANS).split()
        return [*words, *settings_options(SMALL, words[0]), *changed], None
    if kind == "option":
        command, values, options = draw(st.sampled_from(TAKEN))
        small = settings_options(SMALL, SWEEP.split()[0]) if command == SWEEP else []
        option = f"{draw(st.sampled_from(options))}={draw(values)}"
        return [*command.split(), *small, option], None
    return [*draw(st.sampled_from(NAMED)).split(), "--", draw(WORDS | SOUP)], None


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
        ended = type(caught).__name__
        error = traceback.format_exc()
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


@pytest.mark.long
def test_settings_files_and_options(small_sweep, tmp_path, capfd, monkeypatch):
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
    def run_one(question: tuple[list[str], str | bytes | None]) -> None:
        words, content = question
        if content is not None:
            data = content.encode("utf-8", "replace") if isinstance(content, str) else content
            file.write_bytes(data)
        # A command line passes any text on, but for NUL.
        typed = [word.replace("\0", "").encode("utf-8", "replace").decode() for word in words]
        name, *others = [str(file) if word == "FILE" else word for word in typed]
        ended, printed = ask(capfd, [name, "--workspace", str(workspace), *others])
        if kind := finding(ended, printed):
            findings.setdefault(kind, f"{words} {content!r}\n{printed[-1500:]}")

    run_one()
    assert not findings, "\n\n".join(f"### {kind}: {text}" for kind, text in findings.items())
