"""Change the code at random places, and see whether the quick tests notice.

`make mutants-random N=60 SEED=1` draws functions of the packages below, and in each of them an
operator, a comparison, a constant or an argument that it changes. It runs those quick tests that
run the changed line, the fastest first, until one of them fails. Which tests run a line is recorded
once for a state of the code, in pytest's cache; so are the verdicts, and the same command goes on
with the rest. At the end it prints the share of changes that were noticed in each package, and each
that was not.

The faults of `mutants.toml` are chosen, and every one of them must be noticed. These are not: some
change nothing that could be noticed. Programs like mutmut and cosmic-ray make all changes of a
module and start Python for each, and to import PyTorch takes longer than most of the tests.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from mutants import ROOT, Mutant, copy_project, import_libraries, run_all

PACKAGES = (
    "iiet", "orchestrator/training", "orchestrator/sweeping", "orchestrator/evaluation",
    "orchestrator/reporting/statistics.py",
)  # fmt: skip
TRACED = ("iiet", "orchestrator")
CACHE = ROOT / ".pytest_cache" / "random-mutants"
RECORD_VARIABLE = "RANDOM_MUTANTS_RECORD"
"""Names the file that a run of tests with this module as a plugin writes."""
CALLS_WITH_LINES = 300
"""Calls of a function in one test whose lines are recorded; more would take minutes."""
MEMORY_BYTES = 12 * 2**30
"""Most memory of the tests of a change, which may ask for any amount."""
NOTICED = "noticed"
SURVIVED = "survives"
NOT_RUN = "no quick test runs it"

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.USub: ast.UAdd,
}  # fmt: skip
"""Operators and comparisons, and what stands in their place."""
COMMUTATIVE = (
    "transpose", "promote_types", "max", "min", "maximum", "minimum", "equal", "gcd",
)  # fmt: skip
"""Functions whose first two arguments may stand in either order."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


# The changes


@dataclass(frozen=True)
class Change:
    """An expression of a file and what replaces it."""

    file: str
    function: str
    function_line: int
    """The function's first line, with its decorators."""
    line: int
    """The expression's first line."""
    start: int
    """Place of the expression's first character in the file."""
    end: int
    new: str

    def apply(self, text: str) -> str:
        """Return the file's text with the change."""
        return text[: self.start] + self.new + text[self.end :]

    @property
    def package(self) -> str:
        """The one of `PACKAGES` that it is in."""
        return next(name for name in PACKAGES if self.file.startswith(name))

    def describe(self, text: str) -> str:
        """Return the change in a line; `text` is the file's."""
        old = " ".join(text[self.start : self.end].split())
        return f"{self.file}:{self.line} {self.function}: {old} -> {self.new}"


def changes_of(file: str, text: str, name: str, function: Function) -> list[Change]:
    """Return all changes of a function of a file."""
    lines = text.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]

    def place(line: int, column: int) -> int:
        # `ast` counts the bytes of a line.
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    return [
        Change(
            file=file,
            function=name,
            function_line=first_line(function),
            line=node.lineno,
            start=place(node.lineno, node.col_offset),
            end=place(node.end_lineno or 0, node.end_col_offset or 0),
            new=new,
        )
        for node in _expressions(function)
        for new in _replacements(node)
    ]


def first_line(function: Function) -> int:
    """Return a function's first line with its decorators, as code objects say it."""
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


def functions_of(tree: ast.AST, prefix: str = "") -> Iterator[tuple[Function, str]]:
    """Yield functions and methods; one within a function belongs to that."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node, prefix + node.name
        elif isinstance(node, ast.ClassDef):
            yield from functions_of(node, f"{prefix}{node.name}.")


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the expressions that are computed: not annotations, defaults, decorators and texts.

    The texts of errors are left out as well: tests do not quote sentences.
    """
    if isinstance(node, Function):
        children: list[ast.AST] = [*node.body]
    elif isinstance(node, ast.AnnAssign):
        children = [node.value] if node.value else []
    elif isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert):
        children = []
    else:
        children = [*ast.iter_child_nodes(node)]
    if isinstance(node, ast.expr):
        yield node
    for child in children:
        yield from _expressions(child)


def _replacements(node: ast.expr) -> Iterator[str]:
    """Yield what may stand in the place of an expression."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield str(not node.value)
        elif isinstance(node.value, int | float):
            yield str(node.value + 1)
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.UnaryOp):
        if new := SWAPPED.get(type(node.op)):
            yield _unparsed(node, op=new())
        elif isinstance(node.op, ast.Not):
            yield f"({ast.unparse(node.operand)})"
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            operators = [*node.ops]
            operators[number] = SWAPPED[type(operator)]()
            yield _unparsed(node, ops=operators)
    if isinstance(node, ast.Call):
        for number, keyword in enumerate(node.keywords):
            if keyword.arg:  # Not `**named`.
                yield _unparsed(node, keywords=node.keywords[:number] + node.keywords[number + 1 :])
        is_plain = not any(isinstance(argument, ast.Starred) for argument in node.args[:2])
        name = ast.unparse(node.func).rpartition(".")[2]
        if len(node.args) > 1 and is_plain and name not in COMMUTATIVE:
            first, second, *others = node.args
            yield _unparsed(node, args=[second, first, *others])


def _unparsed(node: ast.expr, **changes: Any) -> str:
    changed = copy.copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return f"({ast.unparse(changed)})"


def draw_changes(
    number: int, seed: int, called: set[tuple[str, int]] | None = None
) -> list[Change]:
    """Draw functions, and a change in each; the same for the same seed and code.

    Args:
        called: Files and first lines of the functions that may be drawn; all if unset.
    """
    functions = [
        (file, text, name, function)
        for file, text, name, function in all_functions()
        if called is None or (file, first_line(function)) in called
    ]
    draw = random.Random(seed)
    draw.shuffle(functions)
    drawn: list[Change] = []
    for function in functions:
        if len(drawn) == number:
            break
        if changes := changes_of(*function):
            drawn.append(draw.choice(changes))
    return drawn


@cache
def all_functions() -> tuple[tuple[str, str, str, Function], ...]:
    """Return the functions of `PACKAGES`: file, its text, name, function."""
    paths = [path for name in PACKAGES for path in _modules(ROOT / name)]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(paths)}
    return tuple(
        (file, text, name, function)
        for file, text in texts.items()
        for function, name in functions_of(ast.parse(text))
    )


def _modules(path: Path) -> Iterator[Path]:
    return iter([path]) if path.is_file() else path.rglob("*.py")


# Which tests run a line. This module is a plugin of pytest then.


class Recorder:
    """Records the lines of the project that each test runs, also in its fixtures and threads.

    A fixture that several tests share is recorded for each of them, not only for the first.
    """

    def __init__(self) -> None:
        self.lines: dict[str, set[tuple[str, int]]] = defaultdict(set)
        """Test, or shared fixture -> files with lines."""
        self.seconds: dict[str, float] = {}
        """Test -> how long it took."""
        self._current: set[tuple[str, int]] = set()
        self._calls: Counter[Any] = Counter()
        self._known: dict[str, str] = {}
        """File of a code object -> its path in the project; empty if it is not of the project."""

    def trace(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        """Record a call, as `sys.settrace` asks; the first calls are followed line by line."""
        code = frame.f_code
        file = self._known.get(code.co_filename)
        if file is None:
            path = Path(code.co_filename)
            is_ours = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in TRACED
            file = path.relative_to(ROOT).as_posix() if is_ours else ""
            self._known[code.co_filename] = file
        if not file:
            return None
        self._current.add((file, -code.co_firstlineno))
        self._calls[code] += 1
        if self._calls[code] > CALLS_WITH_LINES:
            return None

        def trace_line(frame: FrameType, event: str, _arg: Any) -> Any:
            if event == "line":
                self._current.add((file, frame.f_lineno))
            return trace_line

        return trace_line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Record a test with its setup."""
        started = time.perf_counter()
        self._current = self.lines[item.nodeid]
        self._calls.clear()
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            self.seconds[item.nodeid] = time.perf_counter() - started
            for name in getattr(item, "fixturenames", ()):
                self.lines[item.nodeid] |= self.lines.get(name, set())

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
        """Record a shared fixture."""
        if fixturedef.scope == "function":
            return (yield)
        outside = self._current
        self._current = self.lines[fixturedef.argname]
        try:
            return (yield)
        finally:
            self._current = outside

    def pytest_sessionfinish(self) -> None:
        """Write the record."""
        tests = {
            name: {"seconds": seconds, "lines": sorted(self.lines[name])}
            for name, seconds in self.seconds.items()
        }
        Path(os.environ[RECORD_VARIABLE]).write_text(json.dumps(tests))


def pytest_configure(config: pytest.Config) -> None:
    """Record, if this run is one that shall."""
    if RECORD_VARIABLE in os.environ:
        config.pluginmanager.register(Recorder(), "random-mutants-recorder")


def read_record(tests: list[str]) -> dict[str, Any]:
    """Return what each quick test runs; the tests run for this if the code is not known.

    Args:
        tests: Files or folders of the tests; all if empty.
    """
    digest = hashlib.sha256(repr(tests).encode())
    for name in (*TRACED, "tests"):
        for path in sorted((ROOT / name).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    path = CACHE / f"{digest.hexdigest()[:16]}.json"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        print("The quick tests run once, to see which lines each of them runs ...", flush=True)
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT / "tests"), RECORD_VARIABLE: f"{path}.new",
        }  # fmt: skip
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "random_mutants"),
            *("-m", "not slow", *tests),
        ]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if code not in (0, 1):  # Some tests may fail because they are traced.
            sys.exit("The tests cannot be run; see above.")
        Path(f"{path}.new").replace(path)
    record: dict[str, Any] = json.loads(path.read_text())
    return {"key": path.stem, "tests": record}


def covering_tests(change: Change, record: dict[str, Any]) -> list[str]:
    """Return the tests that run a change, the fastest first.

    A test that calls a function very often may not be known to run a line of it. So those that call
    it count if no test is known to run the line.
    """
    for line in (change.line, -change.function_line):
        names = [n for n, test in record["tests"].items() if [change.file, line] in test["lines"]]
        if names:
            return sorted(names, key=lambda name: float(record["tests"][name]["seconds"]))
    return []


# The command


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "tests", nargs="*", help="files or folders of tests; functions that these call"
    )
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=45, help="begin no change after that")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    over_at = time.monotonic() + 60 * options.minutes
    record = read_record(options.tests)
    called = None
    if options.tests:
        lines = [line for test in record["tests"].values() for line in test["lines"]]
        called = {(file, -line) for file, line in lines if line < 0}
    changes = draw_changes(options.number, options.seed, called)
    texts = {change.file: (ROOT / change.file).read_text() for change in changes}
    verdicts = CACHE / f"{record['key']}-seed-{options.seed}.jsonl"
    known: dict[str, str] = {}
    if verdicts.is_file():
        known = dict(map(json.loads, verdicts.read_text().splitlines()))

    def note(name: str, verdict: str, seconds: float = 0.0) -> None:
        known[name] = verdict
        with verdicts.open("a") as file:
            file.write(json.dumps([name, verdict]) + "\n")
        print(f"{verdict:8}  {seconds:4.0f} s  {name}", flush=True)

    waiting = []
    for change in changes:
        text = texts[change.file]
        name = change.describe(text)
        if name in known:
            continue
        if tests := covering_tests(change, record):
            waiting.append(Mutant(name, change.file, text, change.apply(text), tuple(tests)))
        else:
            note(name, NOT_RUN)
    if waiting:
        print(f"{len(waiting)} of {len(changes)} changes; importing the libraries ...", flush=True)
        import_libraries()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            copies = [Path(folder).resolve() / f"copy-{n}" for n in range(options.processes)]
            for project_copy in copies:
                copy_project(project_copy)
            in_time = (mutant for mutant in waiting if time.monotonic() < over_at)
            for run, code in run_all(in_time, copies):
                seconds = time.monotonic() - run.started
                # Other codes than 1 are those of tests that a change keeps from being imported.
                note(run.mutant.name, NOTICED if code else SURVIVED, seconds)
    report(changes, texts, known)


def report(changes: list[Change], texts: dict[str, str], known: dict[str, str]) -> None:
    """Print the share that was noticed in each package, and each change that was not."""
    by_package: dict[str, Counter[str]] = defaultdict(Counter)
    for change in changes:
        verdict = known.get(change.describe(texts[change.file]), "left")
        by_package[change.package][verdict] += 1
    print()
    for package in PACKAGES:
        counts = by_package[package]
        if done := counts.total() - counts["left"]:
            share = counts[NOTICED] / done
            print(f"{package:36}  {counts[NOTICED]:3} of {done:3} are noticed ({share:.0%})")
    for name, verdict in known.items():
        if verdict != NOTICED:
            print(f"{verdict}: {name}")
    if num_left := sum(counts["left"] for counts in by_package.values()):
        print(f"{num_left} are left: run the same command again")


if __name__ == "__main__":
    main()
