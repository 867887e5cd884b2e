"""Fuzzing: with any settings and any damaged files, a command ends with one sentence.

There must be no traceback, no hang, and no silent change of a result. Runs by hand (`make
test-long`), for at most ten minutes. All findings of a test are collected and reported together.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from commands import run_command, settings_options
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small_size import SMALL

from orchestrator import cli
from orchestrator.settings import Section, Settings

pytestmark = pytest.mark.long

NUM_SETTINGS = int(os.environ.get("IIET_FUZZ_SETTINGS", 1000))
NUM_DAMAGES = int(os.environ.get("IIET_FUZZ_DAMAGES", 500))
SECONDS_BEFORE_IT_HANGS = 20
LONGEST_ANSWER = 20_000
PATIENT = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate],  # Findings are collected; minimizing each would take too long.
    suppress_health_check=list(HealthCheck),
)
OPTIONS = settings_options(SMALL)


class Hangs(BaseException):
    """Raised by the alarm; no command catches it."""


@dataclass(frozen=True)
class Answer:
    """The end of a command; the code is negative if it hangs or raises."""

    code: int
    printed: str
    seconds: float


def ask(capfd: pytest.CaptureFixture[str], arguments: list[str], seconds: float) -> Answer:
    """Run a command in this process."""

    def give_up(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    started, error = time.monotonic(), ""
    try:
        code = cli.main(arguments)
    except (Hangs, Exception) as caught:
        code, error = -1 if isinstance(caught, Hangs) else -2, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    captured = capfd.readouterr()
    return Answer(code, captured.out + captured.err + error, time.monotonic() - started)


@dataclass
class Findings:
    """The failures, one of each kind."""

    texts: dict[str, str] = field(default_factory=dict)

    def judge(self, what: object, answer: Answer) -> None:
        """Record an answer that no command may give."""
        printed = answer.printed
        if "The traceback is in" in printed:
            log = Path(printed.partition("The traceback is in ")[2].strip())
            printed += log.read_text() if log.is_file() else ""
        # The last line of our code in a traceback distinguishes findings.
        places = re.findall(r'File ".*?/(?:orchestrator|iiet)/(\S+\.py)", line (\d+)', printed)
        place = ":".join(places[-1]) if places else ""
        if answer.code == -1:
            self.add(f"hangs: {place}", what, printed)
        elif answer.code not in (0, 1, 2) or "Traceback" in printed:
            last = answer.printed.strip().splitlines()[-1] if answer.printed.strip() else ""
            self.add(f"traceback: {last[:80]} {place}", what, printed)
        elif len(printed) > LONGEST_ANSWER:
            self.add("too long an answer", what, printed[:1000])

    def add(self, kind: str, what: object, printed: str) -> None:
        self.texts.setdefault(kind, f"{what}\n{printed[-1500:]}")

    def report(self) -> str:
        return "\n\n".join(f"### {kind}: {text}" for kind, text in self.texts.items())


# --- settings and files -----------------------------------------------------------------------


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
    [
        "pretrain",
        "pretrain",
        "sweep-threshold",
        "sweep-iterations",
        "sweep-threshold --search 2",
        "sweep toy",
    ]
)
SCHEDULES = st.text(alphabet="0123456789,.*()[] -²", max_size=12) | WORDS
LISTS = st.text(alphabet="0123456789,.-+eEnaif² ", max_size=12) | WORDS


def _argument(text: str) -> str:
    """Return text that a command line can pass on: no NUL, and no option by chance."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


@st.composite
def questions(draw: st.DrawFn) -> tuple[list[str], str | bytes | None]:
    """A command that trains nothing, and the content of the file `FILE` in its arguments."""
    kinds = ["tree", "soup", "bytes", "set", "set", "plausible", "plausible", "option", "name"]
    kind = draw(st.sampled_from(kinds))
    if kind == "tree":
        content = yaml.dump(draw(trees()))
        return ["pretrain", "--dry-run", "--config", "FILE"], content
    if kind == "soup":
        return ["pretrain", "--dry-run", "--config", "FILE"], draw(SOUP)
    if kind == "bytes":
        return ["pretrain", "--dry-run", "--config", "FILE"], draw(st.binary(max_size=60))
    if kind == "set":
        several = draw(st.lists(ASSIGNMENTS, min_size=1, max_size=3))
        return ["pretrain", "--dry-run", *(f"--set={_argument(text)}" for text in several)], None
    if kind == "plausible":
        several = draw(st.lists(sound_assignments(), min_size=1, max_size=2))
        changes = [f"--set={text}" for text in several]
        return [*draw(PLANS).split(), "--dry-run", *OPTIONS, *changes], None
    if kind == "option":
        command, option, values = draw(
            st.sampled_from(
                [
                    ("pretrain --dry-run", "--schedule", SCHEDULES),
                    ("pretrain --dry-run", "--steps", LISTS),
                    ("pretrain --dry-run", "--workers", LISTS),
                    ("pretrain --dry-run", "--preset", WORDS),
                    ("pretrain --dry-run", "--method", WORDS),
                    ("pretrain --dry-run", "--storage", WORDS),
                    ("pretrain --dry-run", "--name", WORDS),
                    ("pretrain --dry-run", "--mfu", LISTS),
                    ("generate --prompt=a -n 2", "--schedule", SCHEDULES),
                    ("generate --prompt=a -n 2", "--seed", LISTS),
                    ("generate --prompt=a -n 2 --temperature=1", "--top-p", LISTS),
                    ("generate --prompt=a -n 2 --temperature=1", "--top-k", LISTS),
                    ("generate --prompt=a -n 2", "--temperature", LISTS),
                    ("generate -n 2", "--prompt", WORDS),
                    ("generate --prompt=a -n 2", "--stop", WORDS),
                    ("sweep-threshold --dry-run", "--thresholds", LISTS),
                    ("sweep-threshold --dry-run", "--budgets", LISTS),
                    ("sweep-threshold --dry-run", "--cost", WORDS),
                    ("sweep-threshold --dry-run", "--seeds", LISTS),
                    ("sweep-threshold --dry-run", "--name", WORDS),
                    ("search --dry-run", "--seed", LISTS),
                    ("pick --dry-run", "--keep", LISTS),
                    ("pick --dry-run", "--budget", LISTS),
                    ("pick --dry-run", "--confidence", LISTS),
                    ("pick --dry-run", "--cost", WORDS),
                ]
            )
        )
        small = OPTIONS if "sweep" in command or "search" in command else []
        return [*command.split(), *small, f"{option}={_argument(draw(values))}"], None
    command = draw(
        st.sampled_from(
            ["report", "pick --dry-run", "evaluate", "generate -p a", "prepare", "export", "import"]
        )
    )
    return [*command.split(), "--", _argument(draw(WORDS | SOUP))], None


def test_settings_files_and_options(
    toy: Toy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = Findings()
    place = toy.root.parent / "settings"
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)

    @settings(PATIENT, max_examples=NUM_SETTINGS)
    @given(questions())
    def each(question: tuple[list[str], str | bytes | None]) -> None:
        arguments, content = question
        file = place / "s.yaml"
        if content is not None:
            data = content.encode("utf-8", "replace") if isinstance(content, str) else content
            file.write_bytes(data)
        words = [str(file) if word == "FILE" else word for word in arguments]
        name, *others = words
        words = [name, "--workspace", str(toy.root), *others]
        findings.judge((words, content), ask(capfd, words, 3 * SECONDS_BEFORE_IT_HANGS))

    each()
    toy.restore()
    assert not findings.texts, findings.report()


# --- damaged files ----------------------------------------------------------------------------


@dataclass
class Toy:
    """A workspace in which every command has run, and its copy, from which each example starts."""

    root: Path
    copy: Path
    files: list[Path] = field(default_factory=list)

    def restore(self) -> None:
        """Put back what differs from the copy, by size, time and kind."""
        for path in sorted(self.root.rglob("*"), reverse=True):
            twin = self.copy / path.relative_to(self.root)
            if path.is_symlink() or (path.is_file() and not twin.is_file()):
                path.unlink()
            elif path.is_dir() and not twin.is_dir():
                shutil.rmtree(path)
        for twin in self.copy.rglob("*"):
            path = self.root / twin.relative_to(self.copy)
            if twin.is_dir():
                path.mkdir(exist_ok=True)
            elif not path.exists() or _stamp(path) != _stamp(twin):
                if twin.name == "mlflow.db":  # An open connection would keep the old content.
                    _forget_database()
                shutil.copy2(twin, path)
        self.restore_times()

    def restore_times(self) -> None:
        """Put back the times of folders, by which commands order runs and find the newest."""
        for twin in [self.copy, *self.copy.rglob("*")]:
            if twin.is_dir() and (folder := self.root / twin.relative_to(self.copy)).is_dir():
                os.utime(folder, ns=(twin.stat().st_atime_ns, twin.stat().st_mtime_ns))


def _stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Made by real runs in their own processes."""
    root = tmp_path_factory.mktemp("fuzz") / "space"
    for command in (
        ["sweep", "toy", *OPTIONS],
        ["evaluate", "--schedule", "1", *OPTIONS],
        ["influence", *OPTIONS],
        ["export", "--no-measure"],
    ):
        run_command(*command, "--workspace", str(root))
    copy = shutil.copytree(root, root.parent / "copy")
    unread = (".png", ".svg", ".html", ".csv", ".md", ".log", ".lock", ".py")
    files = [
        path.relative_to(copy)
        for path in sorted(copy.rglob("*"))
        if path.is_file()
        and path.suffix not in unread
        and path.relative_to(copy).parts[0] not in ("artifacts", "logs")
    ]
    return Toy(root, copy, files)


def _cut(path: Path, at: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(at * len(data))])


def _flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    if data:
        place = min(int(at * len(data)), len(data) - 1)
        data[place] ^= 1 << int(at * 8e6) % 8
        path.write_bytes(data)


def _empty(path: Path, _: float) -> None:
    path.write_bytes(b"")


def _folder(path: Path, _: float) -> None:
    path.unlink()
    path.mkdir()


def _link_loop(path: Path, _: float) -> None:
    path.unlink()
    path.symlink_to(path)


def _deep(path: Path, at: float) -> None:
    depth = 100_000 if at > 0.5 else 500
    path.write_text("[" * depth + "]" * depth)


DAMAGES: dict[str, Callable[[Path, float], None]] = {
    "cut off": _cut,
    "flipped": _flip,
    "emptied": _empty,
    "a folder": _folder,
    "a link to itself": _link_loop,
    "deep": _deep,
}
COMMANDS: dict[str, list[str]] = {
    "generate": ["generate", "--prompt", "The", "-n", "4"],
    "evaluate": ["evaluate", *OPTIONS],
    "evaluate another schedule": ["evaluate", "--schedule", "1", *OPTIONS],
    "evaluate anew": ["evaluate", "--schedule", "0", *OPTIONS],
    "evaluate an export": ["evaluate", "EXPORT", *OPTIONS],
    "influence": ["influence", *OPTIONS],
    "report": ["report"],
    "report of flops": ["report", "--cost", "flops", "--quality", "loss"],
    "pick": ["pick", "--dry-run"],
    "pick and export": ["pick", "--best"],
    "export": ["export", "--no-measure"],
    "export with quality": ["export", *OPTIONS],
    "import": ["import", "EXPORT", "--name", "again"],
    "plan of students": ["sweep-threshold", "--dry-run", *OPTIONS],
    "plan of a sweep": ["sweep", "toy", "--dry-run", *OPTIONS],
    "plan of a search": ["sweep-threshold", "--search", "2", "--dry-run", *OPTIONS],
    "prepare": ["prepare", *OPTIONS],
    "plan of a training": ["pretrain", "--dry-run", *OPTIONS],
    "training": ["pretrain", "--local", *OPTIONS],
    "sync": ["sync"],
}
_MODELS = (
    "generate", "evaluate", "evaluate another schedule", "evaluate anew", "influence", "export",
    "export with quality", "plan of students", "plan of a sweep", "plan of a search", "training",
)  # fmt: skip
_FRONTS = ("report", "report of flops", "pick", "pick and export")
READERS: dict[str, tuple[str, ...]] = {
    "evaluations": ("evaluate", "evaluate another schedule", "export with quality"),
    "exports": ("evaluate an export", "import", "export"),
    "first_stages": ("training", "plan of a sweep"),
    "mlflow.db": (*_FRONTS, "sync", "evaluate", "influence", "training"),
    "runs": (*_MODELS, *_FRONTS),
    "sweeps": (*_FRONTS, "plan of students", "plan of a sweep"),
    "tokens": (*_MODELS, "prepare", "plan of a training", "evaluate an export"),
    "trials": (*_FRONTS, "plan of students", "plan of a sweep", "plan of a search"),
}
"""By folder of the workspace: the commands that read it."""
SAYS_SO = re.compile(
    r"damaged|not prepared|not what was written|cannot|missing|no whole|contradicts|left out"
    r"|made anew|is a folder|has no |measured again|not finished|no tokens|no paired errors"
    r"|other settings",
    re.IGNORECASE,
)


def numbers_of(printed: str) -> list[str]:
    """Return the lines of an answer without times and rates, which differ between calls."""
    text = re.sub(
        r"Writing model shards.*|\(\d+ s\)|[\d.]+ (?:ms|s|min|h)\b|found again", "", printed
    )
    text = re.sub(r";\s+[\d.]+\s+\w+\s+are\s+free", "", text)
    text = re.sub(r"about [^,;]*|\d[\d.,]* (?:GFLOP|GB|MB|tokens/s)\S*", "", text)
    return [line for line in (" ".join(line.split()) for line in text.splitlines()) if line]


def test_damaged_files(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    findings = Findings()
    usual: dict[str, Answer] = {}
    exported = str(next((toy.root / "exports").iterdir()))
    calls = {
        name: [
            first,
            "--workspace",
            str(toy.root),
            *(exported if w == "EXPORT" else w for w in more),
        ]
        for name, (first, *more) in COMMANDS.items()
    }
    for name, words in calls.items():
        toy.restore()
        ask(capfd, words, 600)  # The first call imports what it needs.
        toy.restore()
        usual[name] = ask(capfd, words, 600)
        assert usual[name].code == 0, usual[name].printed

    # What many commands read is damaged as often as what lies there a hundred times.
    groups: dict[str, list[Path]] = {}
    for file in toy.files:
        kind = re.sub(r"[0-9a-f]{8,}|\d+", "N", file.name)
        groups.setdefault(f"{file.parts[0]} {kind}", []).append(file)

    @settings(PATIENT, max_examples=NUM_DAMAGES)
    @given(
        group=st.sampled_from(sorted(groups)),
        which=st.integers(0, 1000),
        how=st.sampled_from(sorted(DAMAGES)),
        at=st.floats(0, 1, exclude_max=True),
        reader=st.integers(0, 1000),
    )
    def each(group: str, which: int, how: str, at: float, reader: int) -> None:
        toy.restore()
        file = toy.root / groups[group][which % len(groups[group])]
        DAMAGES[how](file, at)
        toy.restore_times()
        if file.name == "mlflow.db":
            _forget_database()
        readers = READERS.get(group.split()[0], tuple(COMMANDS))
        name = readers[reader % len(readers)]
        limit = max(SECONDS_BEFORE_IT_HANGS, 5 * usual[name].seconds)
        answer = ask(capfd, calls[name], limit)
        what = f"{file.relative_to(toy.root)} {how} at {at:.6f}, then {name}"
        findings.judge(what, answer)
        known = numbers_of(usual[name].printed)
        new = "\n".join(line for line in numbers_of(answer.printed) if line not in known)
        is_same = numbers_of(answer.printed) == known
        is_compared = answer.code == 0
        if is_compared and not is_same and not SAYS_SO.search(new):
            kind = f"silent change: {group} {name}"
            findings.add(kind, what, f"{answer.printed}\n--- usually\n{usual[name].printed}")
        if file.name == "mlflow.db":
            _forget_database()

    each()
    assert not findings.texts, findings.report()


def _forget_database() -> None:
    """Close what MLflow keeps open in this process, so that it reads the file again."""
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryStore
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as TrackingStore
    from mlflow.tracking._model_registry import utils as registry
    from mlflow.tracking._tracking_service import utils as tracking

    for store in (TrackingStore, RegistryStore):
        for engine in store._engine_map.values():
            engine.dispose()
        store._engine_map.clear()
    tracking._tracking_store_registry._get_store_with_resolved_uri.cache_clear()
    registry._get_store_registry()._get_store_with_resolved_uri.cache_clear()
