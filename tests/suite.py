"""How the tests run: a plugin of pytest that `conftest.py` loads. It changes no result of a test.

- No test sees what the person who runs it has set (`clean_environment.py`).
- Marks follow from other marks, and failed assertions of the modules beside this file say what the
  values were, as those of tests do.
- A file of tests runs in one process, all files that use Ray in the same one, the longest first.

Thousands of tests take minutes on two cores, because

- temporary files are in memory, PyTorch has one thread, and garbage is rarely looked for;
- files that are slow as a whole are not imported for the quick tests;
- MLflow makes a database by all migrations of its history, which takes a second of CPU and dozens
  of waits for the disk: one is made like this, and the others get its tables;
- commands are forked from a process that has imported everything (`commands.py`), and so are the
  workers of the one Ray (`forked_ray_workers.py`), which saves four CPU seconds each time.
"""

from __future__ import annotations

import gc
import getpass
import os
import re
import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from contextlib import closing
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import clean_environment  # noqa: F401 (before all others, some of which read variables)
import pytest
from hypothesis import HealthCheck, settings
from laws import USUAL_EXAMPLES, examples

from orchestrator.cluster.ray import address_variables

SECONDS_KEY = "iiet/seconds"
"""Name of the seconds of each test file in pytest's cache."""
SLOW_FILE = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.(?:slow|long|installs)\b", re.MULTILINE)
SECONDS_TAKEN: Counter[str] = Counter()
"""Seconds of each file in this run."""
MEMORY = Path("/dev/shm")
"""A file system in memory, on Linux."""
MEMORY_BYTES = 4e9
"""Must be free there: a whole run leaves 0.2 GB of files, and each Ray takes some as well."""

pytest.register_assert_rewrite(
    *(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in sys.modules)
)

# Until all tests are imported, nothing becomes garbage, and looking for it takes a second.
gc.disable()

# No deadline: on a busy machine any example may take a second.
settings.register_profile(
    "patient",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=examples(USUAL_EXAMPLES),
)
settings.load_profile("patient")


def _put_temporary_files_into_memory() -> None:
    """Use a file system in memory for them, where one is large enough.

    The program waits for the disk after each file that a crash must not lose, and a third of the
    tests' time was this. `TMPDIR` chooses another place.
    """
    if "TMPDIR" in os.environ or not os.access(MEMORY, os.W_OK | os.X_OK):
        return
    # What is compiled is found again by later runs, and some containers run no programs there.
    in_files = f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", in_files)
    forbids_programs = os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
    if shutil.disk_usage(MEMORY).free >= MEMORY_BYTES and not forbids_programs:
        os.environ["TMPDIR"] = str(MEMORY)
        tempfile.tempdir = None  # It is looked up again.


_put_temporary_files_into_memory()

# Set before PyTorch is imported. Tiny models gain nothing from a second thread, and on a busy
# machine two threads that wait for each other take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # For programs with two threads.
# Set before a test imports Ray, which reads it then.
os.environ.update({name: value for name, value in address_variables("local").items() if value})


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer another order of the tests."""
    parser.addoption("--reversed", action="store_true", help="begin with the last test")


def pytest_configure(config: pytest.Config) -> None:
    """Ignore Ray's deprecation warnings about its own calls."""
    config.addinivalue_line("filterwarnings", r"ignore::DeprecationWarning:ray\.")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out, in a quick run, the files that are slow as a whole: they import much."""
    if config.getoption("markexpr") != "not slow" or collection_path.suffix != ".py":
        return None
    return bool(SLOW_FILE.search(collection_path.read_text(encoding="utf-8"))) or None


@pytest.hookimpl(tryfirst=True)  # Before pytest reads the marks for `-m`.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the marks that follow from others and from hypothesis, and say who runs a test and when.

    A file runs in one process, because of its fixtures, and all files that need Ray in the same.
    They come first; the others follow by their seconds in the last run, where it is known, so that
    no process waits for the other at the end.
    """
    for mark, implied in (("installs", "long"), ("long", "slow")):
        for item in items:
            if item.get_closest_marker(mark):
                item.add_marker(implied)
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("law")
    slow = Counter(item.path.stem for item in items if item.get_closest_marker("slow"))
    seconds = {**slow, **_stored_seconds(config)}
    left_out = config.getoption("markexpr").removeprefix("not ")
    with_ray = {
        item.path.stem
        for item in items
        if "ray_session" in getattr(item, "fixturenames", ())
        and not item.get_closest_marker(left_out)
    }
    for item in items:
        group = "ray" if item.path.stem in with_ray else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda i: (i.path.stem not in with_ray, -seconds.get(i.path.stem, 0)))
    if config.getoption("reversed"):
        items.reverse()


def pytest_collection_finish() -> None:
    """Look for garbage again, but not among the modules, and more rarely than usual.

    Tests make little of it, and each look at all objects takes a quarter of a second.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 50)
    gc.enable()


def _pytest_cache(config: pytest.Config) -> Any:
    # What pytest keeps from one run to the next; None if that is switched off.
    return getattr(config, "cache", None)


def _stored_seconds(config: pytest.Config) -> dict[str, float]:
    pytest_cache = _pytest_cache(config)
    seconds: dict[str, float] = pytest_cache.get(SECONDS_KEY, {}) if pytest_cache else {}
    return seconds


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the seconds of each file."""
    SECONDS_TAKEN[Path(report.location[0]).stem] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Store the seconds of each file for the order of the next run."""
    config = session.config
    pytest_cache = _pytest_cache(config)
    if pytest_cache and not hasattr(config, "workerinput"):
        pytest_cache.set(SECONDS_KEY, {**_stored_seconds(config), **SECONDS_TAKEN})


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Copy MLflow's databases once MLflow is imported; before the fixtures that make some.

    Each test begins with one thread, as a process of its own would: a trial that ran in this
    process sets its own number, and two threads add numbers in another order.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    _copy_databases(_first_database(item.config))


@cache
def _first_database(config: pytest.Config) -> Path:
    # Where MLflow's first database is kept: in pytest's cache, so that later runs find it.
    pytest_cache = _pytest_cache(config)
    if pytest_cache is None:
        temporary: pytest.TempPathFactory = config._tmp_path_factory
        folder = temporary.getbasetemp()
    else:
        folder = pytest_cache.mkdir("mlflow-databases")
    versions = [metadata.version(library) for library in ("mlflow", "sqlalchemy", "alembic")]
    return folder / f"{'-'.join(versions)}.db"


def _copy_databases(template: Path) -> None:
    """Let MLflow, once it is imported, copy `template` instead of migrating an empty database."""
    utils: Any = sys.modules.get("mlflow.store.db.utils")
    if utils is None or hasattr(utils._initialize_tables, "migrate"):
        return
    migrate = utils._initialize_tables

    def copy_or_migrate(engine: Any) -> None:
        if engine.dialect.name != "sqlite" or not utils._is_empty_database(engine):
            migrate(engine)
        elif template.exists():
            _copy_database(template, Path(engine.url.database))
        else:
            migrate(engine)
            # Another process may do the same.
            unfinished = template.with_name(f"{template.name}.{os.getpid()}")
            _copy_database(Path(engine.url.database), unfinished)
            unfinished.replace(template)

    copy_or_migrate.migrate = migrate
    utils._initialize_tables = copy_or_migrate


def _copy_database(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)


@pytest.fixture(scope="module", autouse=True)
def _modules_are_no_garbage() -> None:
    """Leave the modules out of the search for garbage again.

    A training in this process has ended with `gc.unfreeze`, and a search that a library asks for
    would take a second. Not before each test, as what is garbage now stays for ever.
    """
    gc.freeze()
