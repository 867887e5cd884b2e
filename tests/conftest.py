"""Fixtures shared by the tests of several packages: tiny tokens, a tiny model, one Ray per
session."""

from __future__ import annotations

import gc
import getpass
import hashlib
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import clean_environment  # noqa: F401 (before the others, which read variables)
import pytest
from commands import run_here, settings_options
from copied_database import copy_databases
from hypothesis import HealthCheck, settings
from laws import USUAL_EXAMPLES, examples
from small_size import SMALL
from terminal import unanswered

from orchestrator.cluster.ray import address_variables

ROOT = Path(__file__).resolve().parent.parent
SECONDS_KEY = "iiet/seconds"
"""Name of the seconds of each test file in pytest's cache."""
SLOW_FILE = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.(?:slow|long|installs)\b", re.MULTILINE)
SECONDS_TAKEN: Counter[str] = Counter()
"""Seconds of each file in this run."""
MEMORY = Path("/dev/shm")
"""A file system in memory, on Linux."""
MEMORY_BYTES = 4e9
"""Must be free there: a whole run leaves 0.2 GB of files, and each Ray takes some as well."""

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
    copy_databases(_first_database(item.config))


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


@pytest.fixture(scope="module", autouse=True)
def _modules_are_no_garbage() -> None:
    """Leave the modules out of the search for garbage again.

    A training in this process has ended with `gc.unfreeze`, and a search that a library asks for
    would take a second. Not before each test, as what is garbage now stays for ever.
    """
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_workspace(tmp_path, monkeypatch) -> None:
    """Give a command that names no workspace one that no other test sees."""
    monkeypatch.setenv("IIET_WORKSPACE", str(tmp_path / "own-workspace"))


@pytest.fixture
def terminal() -> Iterator[TextIO]:
    """The input of a terminal into which nobody types."""
    with unanswered() as (_, program_end), os.fdopen(os.dup(program_end)) as input_file:
        yield input_file


@pytest.fixture
def full_memory(monkeypatch) -> None:
    """Each backward pass of this process runs out of memory."""
    import torch

    def without_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no space")

    monkeypatch.setattr(torch.autograd, "backward", without_memory)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="session")
def tiny_tokens(tmp_path_factory) -> Path:
    """A folder of a few thousand prepared tokens of made-up sentences."""
    from sample_texts import tokens_of

    draw = random.Random(0)
    words = [
        "".join(draw.choice("abcdefghijklmnop") for _ in range(draw.randint(2, 8)))
        for _ in range(200)
    ]
    texts = [" ".join(draw.choice(words) for _ in range(60)) + "." for _ in range(80)]
    folder = tmp_path_factory.mktemp("tokens")
    return tokens_of(texts, folder, vocab_size=300, validation_fraction=0.2)


@pytest.fixture(scope="session")
def tiny_model() -> dict[str, Any]:
    """The config, as plain values, of an IIET that trains a step in milliseconds."""
    from iiet.config import ModelConfig
    from iiet.schedule import IterationSchedule

    return ModelConfig(
        vocab_size=300,
        dim=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        ffn_dim=32,
        context_length=16,
        schedule=IterationSchedule((2, 1)),
    ).to_dict()


@pytest.fixture(scope="session")
def save_tiny(tiny_tokens, tiny_model) -> Callable[..., Path]:
    """A function that saves an untrained model: the run's folder, then changes of `tiny_model`."""
    import torch

    from iiet.config import ModelConfig
    from iiet.decoder import Decoder
    from orchestrator.data.store import open_tokens
    from orchestrator.training.checkpoint import save_checkpoint

    def save(
        run_folder: Path,
        *,
        seed: int = 0,
        step: int = 1,
        provenance: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Path:
        torch.manual_seed(seed)
        decoder = Decoder(ModelConfig.from_dict({**tiny_model, **changes}))
        return save_checkpoint(
            run_folder,
            step,
            config=decoder.config,
            weights=decoder.state_dict(),
            training_state={},
            tokenizer_path=open_tokens(tiny_tokens).tokenizer_path,
            provenance={"tokens": tiny_tokens.name, **(provenance or {})},
        )

    return save


@pytest.fixture
def tiny_job(tmp_path, tiny_tokens, tiny_model) -> Callable[..., Any]:
    """A function that makes a `TrainingJob` in `tmp_path`: its folder's name, then its recipe."""
    from orchestrator.records.training import TrainingJob
    from orchestrator.settings import TrainingSettings

    def make(name: str = "run", **recipe: Any) -> TrainingJob:
        return TrainingJob(
            run_folder=str(tmp_path / name),
            tokens_folder=str(tiny_tokens),
            model=tiny_model,
            recipe=TrainingSettings(
                **{"num_tokens_per_step": 64, "num_validation_tokens": 64, **recipe}
            ),
        )

    return make


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, tiny_tokens, tiny_model) -> Path:
    """The folder of a finished run of two steps, `teacher`; its users copy it."""
    from orchestrator.records.training import TrainingJob
    from orchestrator.settings import TrainingSettings
    from orchestrator.training.trainer import run_job

    folder = tmp_path_factory.mktemp("trained") / "teacher"
    recipe = {"num_steps": 2, "num_tokens_per_step": 64, "num_validation_tokens": 64}
    run_job(
        TrainingJob(
            run_folder=str(folder),
            tokens_folder=str(tiny_tokens),
            model=tiny_model,
            recipe=TrainingSettings(**recipe),
        )
    )
    return folder


@pytest.fixture
def tiny_plan(tmp_path, tiny_tokens, trained_run) -> Any:
    """A `SweepTrials`: a trained teacher and its students of 20 steps each, which have not run."""
    from iiet.pruning import InfluenceTable
    from orchestrator.records.evaluation import Suite
    from orchestrator.settings import resolve_settings
    from orchestrator.sweeping.students import Students
    from orchestrator.sweeping.trials import trials_of_students
    from orchestrator.workspace.layout import open_workspace

    recipe = {"num_steps": 20, "num_tokens_per_step": 64, "num_validation_tokens": 64}
    settings = resolve_settings({"distillation": {"training": recipe}})
    values = ((0.5, 0.1), (0.3,))
    errors = ((0.0, 0.0), (0.0,))
    table = InfluenceTable(metric="cosine", value_rows=values, error_rows=errors, num_tokens=64)
    teacher = shutil.copytree(trained_run, tmp_path / "teacher") / "step_00000002"
    suite = Suite(suite="x", tokens_folder=str(tiny_tokens))
    return trials_of_students(Students(settings, open_workspace(tmp_path), teacher, suite, table))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray, started once for all tests that need it, with two CPUs; marked slow by its users.

    Its workers are forked. Those of a command in a process of its own start as a user's do.
    """
    from forked_ray_workers import forked_workers

    from orchestrator.cluster.ray import ray_cluster

    with ExitStack() as ends_with_session:
        # Short: a socket's path has little room.
        scratch = ends_with_session.enter_context(
            tempfile.TemporaryDirectory(prefix="iiet-", dir="/tmp")
        )
        variables = ends_with_session.enter_context(forked_workers(Path(scratch)))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            ends_with_session.enter_context(ray_cluster(num_cpus=2))
        yield


@pytest.fixture(scope="session")
def small_sweep(pytestconfig, request) -> Path:
    """A workspace after `iiet-orch sweep toy` at the small size, and beside it, with the ending
    `.txt`, what the command printed.

    Its models are pretrained in this process: under Ray, each would cost 14 CPU seconds more. Its
    users run beside those of Ray, whose first file makes it.
    It is made once, and kept in pytest's cache until a source or a library changes; then for one
    day more, as another run may still read it. Its users are marked slow, and copy it.
    """
    from pretended_ray import train_here

    from orchestrator.training.trainer import run_job
    from orchestrator.workspace.locks import lock_file

    options = settings_options(SMALL, "sweep")
    digest = hashlib.sha256(repr([options, sys.version, list_of_libraries()]).encode())
    for package in ("iiet", "orchestrator", "sweeps"):
        for path in sorted((ROOT / package).rglob("*.*")):
            if path.suffix in (".py", ".yaml", ".html"):
                digest.update(f"{path}\n".encode() + path.read_bytes())
    kept_sweeps = pytestconfig.rootpath / ".pytest_cache" / "small-sweeps"
    workspace = kept_sweeps / digest.hexdigest()[:16]
    printed = workspace.with_suffix(".txt")
    kept_sweeps.mkdir(parents=True, exist_ok=True)
    with lock_file(kept_sweeps / "lock"):
        if not printed.is_file():
            for older in kept_sweeps.glob("*/"):
                if time.time() - older.stat().st_mtime > 24 * 3600:
                    shutil.rmtree(older)
            shutil.rmtree(workspace, ignore_errors=True)  # It was interrupted.
            request.getfixturevalue("ray_session")
            with pytest.MonkeyPatch.context() as patch:
                train_here(patch, run_job)
                printed.write_text(run_here("sweep", "toy", *options, workspace=workspace))
    return workspace


def list_of_libraries() -> list[str]:
    """Return the installed distributions with their versions."""
    return sorted(f"{d.name} {d.version}" for d in metadata.distributions())
