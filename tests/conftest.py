"""Fixtures shared by the tests of several packages: tiny tokens, a tiny model, one Ray per
session."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pytest

if TYPE_CHECKING:
    from orchestrator.workspace.layout import Workspace

pytest_plugins = ["suite"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_workspace(tmp_path, monkeypatch) -> None:
    """Give a command that names no workspace one that no other test sees."""
    monkeypatch.setenv("IIET_WORKSPACE", str(tmp_path / "own-workspace"))


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    """An empty workspace."""
    from orchestrator.workspace.layout import open_workspace

    return open_workspace(tmp_path / "workspace")


@pytest.fixture
def terminal() -> Iterator[TextIO]:
    """The input of a terminal into which nobody types."""
    from terminal import unanswered

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


@pytest.fixture
def tokenizer_path(tiny_tokens) -> Path:
    """The `tokenizer.json` of `tiny_tokens`."""
    from orchestrator.data.store import open_tokens

    return open_tokens(tiny_tokens).tokenizer_path


@pytest.fixture(scope="session")
def tiny_model() -> dict[str, Any]:
    """The config, as plain values, of an IIET that trains a step in milliseconds."""
    from iiet.model.config import ModelConfig
    from iiet.model.schedule import IterationSchedule

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

    from iiet.decoder import Decoder
    from iiet.model.config import ModelConfig
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


@pytest.fixture
def make_job(tiny_job, request) -> Callable[..., Any]:
    """`tiny_job` with the `RECIPE` of the test's file."""
    recipe = request.module.RECIPE
    return lambda name="run", **changes: tiny_job(name, **{**recipe, **changes})


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
    from iiet.iiad.pruning import InfluenceTable
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
    return trials_of_students(
        Students(
            settings.sweep, settings.distillation, open_workspace(tmp_path), teacher, suite, table
        )
    )


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
    from commands import run_here, settings_options
    from pretended_ray import train_here
    from small_size import SMALL

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
