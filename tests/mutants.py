"""Put each fault of `mutants.toml` into a copy of the project, and see whether tests notice.

`make mutants` runs all faults, `make mutants MUTANTS="betas clipping"` those with one of the words
in their name. Each fault replaces a text that occurs once in its file, and names the tests that
must fail then; of a whole file, those marked slow do not run. The same tests must pass without the
fault. The command fails if a fault survives.

To import PyTorch, Ray and MLflow takes longer than most of the tests. So this process imports them
once, with nothing of the project, and forks for each fault, in a copy of its own. That needs a
process of one thread, which is checked.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import importlib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "iiet", "orchestrator", "tests", "sweeps", "docs", "examples", "modeling", "research",
    "benchmarks",
)  # fmt: skip
COPIED_FILES = ("pyproject.toml", "README.md", "Makefile")
LIBRARIES = (
    "torch._dynamo", "torch.profiler", "transformers.generation", "ray.train.torch",
    "ray.tune.search.optuna", "mlflow.pytorch", "mlflow.pyfunc", "lm_eval.evaluator",
    "lm_eval.tasks", "datasets", "optuna", "tokenizers",
    "safetensors.torch", "typer", "rich.table", "pydantic", "pandas", "sqlalchemy", "pytest",
    "pytest_timeout", "xdist.plugin", "anyio.pytest_plugin", "hypothesis",
    "_hypothesis_pytestplugin",
)  # fmt: skip
TIMEOUT_SECONDS = 120  # for one test: a fault may make it run for ever


@dataclass(frozen=True)
class Mutant:
    """A fault: in `file`, `new` in the place of `old`; one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """The tests of a fault in a process of their own, on a copy of the project."""

    mutant: Mutant
    copy: Path
    original: str
    """The changed file without the fault."""
    started: float

    @property
    def output(self) -> Path:
        """The file of what pytest prints."""
        return self.copy.with_suffix(".txt")


def read_mutants(path: Path = ROOT / "tests/mutants.toml") -> list[Mutant]:
    """Return the faults of a file.

    Raises:
        ValueError: Some of them cannot be put into the code as it is; all of these are named.
    """
    entries = tomllib.loads(path.read_text())["mutant"]
    mutants = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    names = Counter(mutant.name for mutant in mutants)
    problems = [f"{name!r} names {count} faults" for name, count in names.items() if count > 1]
    for mutant in mutants:
        where = f"{mutant.name!r}: {mutant.file}"
        if not (ROOT / mutant.file).is_file():
            problems.append(f"{where} does not exist")
            continue
        text = (ROOT / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            problems.append(f"{where} has {text.count(mutant.old)} times: {mutant.old!r}")
            continue
        missing = [test for test in mutant.tests if not _exists(test)]
        if missing or not mutant.tests:
            problems.append(f"{where} has no tests {missing}")
    if problems:
        raise ValueError(f"{path.name} must follow the code:\n  " + "\n  ".join(problems))
    return mutants


def _exists(test: str) -> bool:
    file, _, name = test.partition("::")
    path = ROOT / file
    return path.is_file() and (not name or f"def {name.partition('[')[0]}(" in path.read_text())


def import_libraries() -> None:
    """Import what the project needs, but nothing of the project and no second thread."""
    for setting in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[setting] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True  # The seconds of a file's age do not tell a fault from the next
    installed = [path for path in sys.path if "site-packages" in path]
    inside = [path for path in sys.path if Path(path or ".").resolve().is_relative_to(ROOT)]
    sys.path[:] = [path for path in sys.path if path in installed or path not in inside]
    for name in LIBRARIES:
        importlib.import_module(name)
    project_modules = {"iiet", "orchestrator", "conftest"} & set(sys.modules)
    threads = threading.active_count()  # pyarrow's allocator has one more, made to be forked
    if project_modules or threads > 1:
        sys.exit(f"Cannot fork: {threads} threads run, and {sorted(project_modules)} are imported.")


def start(run: Run) -> int:
    """Run a fault's tests on a copy in a new process, and return the process's number."""
    process = os.fork()
    if process:
        return process
    status = 70  # as `sysexits.h` numbers an error of the program itself
    try:
        handle = os.open(run.output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(run.copy)
        os.environ["PYTHONPATH"] = str(run.copy)
        sys.path.insert(0, str(run.copy))
        sys.argv = ["pytest"]
        import pytest

        marks = "not long" if "::" in "".join(run.mutant.tests) else "not slow"
        status = int(
            pytest.main([
                "-q", *["-x"] * bool(run.mutant.old), "-m", marks, "-p", "no:cacheprovider",
                "-W", "ignore::pytest.PytestAssertRewriteWarning",  # of plugins imported before
                "--timeout", str(TIMEOUT_SECONDS),
                "--timeout-method", "thread", "--basetemp", f"{run.copy}-temporary",
                *run.mutant.tests,
            ])
        )  # fmt: skip
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_all(mutants: Iterable[Mutant], copies: list[Path]) -> Iterator[tuple[Run, int]]:
    """Yield each fault's run and exit code when it ends, as many at a time as there are copies."""
    waiting = iter(mutants)
    free = list(copies)
    running = dict[int, Run]()
    while True:
        while free and (mutant := next(waiting, None)):
            copy = free.pop()
            original = (copy / mutant.file).read_text()
            changed = original.replace(mutant.old, mutant.new)
            if mutant.file.endswith(".py"):  # What is not Python fails any test.
                compile(changed, f"{mutant.file} with {mutant.name!r}", "exec", ast.PyCF_ONLY_AST)
            write_source(copy / mutant.file, changed)
            run = Run(mutant, copy, original, time.monotonic())
            running[start(run)] = run
        if not running:
            return
        process, status = os.wait()
        run = running.pop(process)
        yield run, os.waitstatus_to_exitcode(status)
        write_source(run.copy / run.mutant.file, run.original)
        shutil.rmtree(f"{run.copy}-temporary", ignore_errors=True)
        free.append(run.copy)


def write_source(path: Path, text: str) -> None:
    """Write a module and delete its bytecode, which would be used if both have the same second."""
    path.write_text(text)
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def copy_project(copy: Path) -> None:
    """Copy what tests need, and compile it: the processes write no bytecode."""
    for name in COPIED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in COPIED_FILES:
        shutil.copy2(ROOT / name, copy)
    for name in ("iiet", "orchestrator"):
        compileall.compile_dir(copy / name, quiet=1)


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="run the faults with one of these in their name")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    try:
        mutants = read_mutants()
    except ValueError as error:
        sys.exit(str(error))
    chosen = [
        mutant
        for mutant in mutants
        if not options.words or any(word in mutant.name for word in options.words)
    ]
    print(f"{len(chosen)} of {len(mutants)} faults; importing the libraries ...", flush=True)
    import_libraries()
    tests = sorted({test for mutant in chosen for test in mutant.tests})
    whole_files = [test for test in tests if "::" not in test]
    single_tests = [test for test in tests if "::" in test]
    unchanged = [
        Mutant("no fault", "Makefile", "", "", tuple(kind[number :: options.processes]))
        for kind in (whole_files, single_tests)  # Apart: `start` selects them by other marks.
        for number in range(options.processes)
        if kind[number:]
    ]
    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [Path(folder).resolve() / f"copy-{number}" for number in range(options.processes)]
        for copy in copies:
            copy_project(copy)
        for run, code in run_all(unchanged, copies):
            if code:
                bad.append(run.mutant.name)
                print(run.output.read_text()[-3000:])
        if bad:
            sys.exit("Tests fail without any fault; see above.")
        print("Without any fault, the tests pass.", flush=True)
        for run, code in run_all(chosen, copies):
            output = run.output.read_text()
            failed = re.search(r"^(?:FAILED|ERROR) \S*/(\S+)", output, re.MULTILINE)
            verdict = {0: "SURVIVES", 1: "noticed"}.get(code, f"EXIT {code}")
            by = f"  by {failed[1]}" if failed else ""
            seconds = time.monotonic() - run.started
            print(f"{verdict:8}  {seconds:4.0f} s  {run.mutant.name}{by}", flush=True)
            if code != 1:
                bad.append(run.mutant.name)
            if code not in (0, 1):
                print(output[-3000:])
    print(f"{len(chosen) - len(bad)} of {len(chosen)} faults are noticed.")
    if bad:
        sys.exit("Not noticed: " + "; ".join(bad))


if __name__ == "__main__":
    main()
