"""Workers that share a model write it together, and any number of them reads what others wrote."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import run_workers
from safetensors.torch import load_file, save_file
from same_run import (
    WORKER,
    curve,
    events,
    in_folder,
    kill_workers,
    optimizer_state,
    state_of,
    steps_of,
    worker_arguments,
    workers,
)
from torch import Tensor

from iiet.hf.weights import WEIGHTS, write_folder
from orchestrator.models.folder import MOMENTS_PREFIX, check_checkpoint, load_config, weights_key
from orchestrator.training import shards
from orchestrator.training.shards import ShardSaver, read_shards, write_whole
from orchestrator.training.trainer import run_job
from orchestrator.training.world import World
from orchestrator.workspace.errors import DamagedFile, RunFailed
from orchestrator.workspace.files import UnfinishedFolder, new_folder
from orchestrator.workspace.layout import checkpoint_name, find_checkpoints
from orchestrator.workspace.provenance import file_digest

NUM_STEPS = 6
EVERY = 2
RECIPE: dict[str, Any] = {
    "num_steps": NUM_STEPS, "learning_rate": 1e-2, "warmup_steps": 2, "num_validation_tokens": 16,
    "checkpoint_every_steps": EVERY, "iterate_from_fraction": 0.5,
}  # fmt: skip


# One worker


def test_whole_tensors_have_the_bytes_of_the_library(tmp_path):
    tensors = {"b": torch.rand(7, 3), "a.weight": torch.rand(5), "empty": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "expected")
    pieces: dict[str, list[Path]] = {name: [] for name in tensors}
    for number in range(4):  # The last piece of `b` has one row, that of `a.weight` none.
        file = tmp_path / f"piece-{number}"
        rows = {name: tensor[2 * number : 2 * number + 2] for name, tensor in tensors.items()}
        save_file(rows, file)
        for name in tensors:
            pieces[name].append(file)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    digest = write_whole(tmp_path / "found", shapes, pieces)
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
    assert digest == file_digest(tmp_path / "expected")


@pytest.fixture
def saver() -> Iterator[ShardSaver]:
    """A saver of a model of which one worker has all shards."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    saver = ShardSaver(World())
    try:
        yield saver
    finally:
        saver.close()
        dist.destroy_process_group()


WEIGHT = "layer.weight"
MOMENT = "layer.weight.exp_avg"


def state(value: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights and moments."""
    return {WEIGHT: torch.full((3, 2), value)}, {MOMENT: torch.full((3, 2), -value)}


def test_what_is_saved_is_the_state_at_that_time(saver, tmp_path):
    weights, moments = state(1.0)
    folder = tmp_path / checkpoint_name(1)
    copied = list[float]()

    def complete(unfinished: UnfinishedFolder, checksums: Any, copied_at: float) -> None:
        for name, digest in checksums.items():
            assert file_digest(unfinished.path / name) == digest
        assert {path.name for path in unfinished.path.iterdir()} == set(checksums)
        assert not folder.exists()
        copied.append(copied_at)
        unfinished.finish()

    saving = saver.start(folder, weights, moments, complete)
    for tensor in (*weights.values(), *moments.values()):
        tensor.zero_()  # The next step.
    saving.result()
    assert len(copied) == 1
    assert not list(tmp_path.glob(".*"))
    assert load_file(folder / WEIGHTS)[WEIGHT].eq(1.0).all()
    read_shards(folder, moments)
    assert moments[MOMENT].eq(-1.0).all()


@pytest.mark.parametrize(
    ("call", "place"), [("open", "rows-00001-of"), ("open", WEIGHTS), ("mkdir", "step_00000001")]
)
def test_an_error_is_that_of_its_place_and_leaves_nothing(
    saver, tmp_path, call, place, monkeypatch
):
    call_on_disk = getattr(Path, call)

    def fail(path: Path, *arguments: Any, **named: Any) -> Any:
        if place in path.name:
            raise OSError("no space left")
        return call_on_disk(path, *arguments, **named)

    folder = tmp_path / checkpoint_name(1)
    with new_folder(folder) as earlier:
        (earlier / "file").write_text("earlier")
    with monkeypatch.context() as patched:
        patched.setattr(Path, call, fail)
        with pytest.raises(OSError, match="no space left"):
            saver.start(folder, *state(1.0), lambda *_: None).result()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert [path.name for path in folder.iterdir()] == ["file"]
    saver.start(folder, *state(1.0), lambda unfinished, *_: unfinished.finish()).result()
    assert load_file(folder / WEIGHTS)[WEIGHT].eq(1.0).all()


def test_a_lost_worker_is_no_fault_of_the_disk(saver, tmp_path, monkeypatch):
    # A full disk ends a job, and a lost worker starts it again, so the errors differ.
    lost = Future[Any]()
    lost.set_exception(RuntimeError("connection closed by peer"))
    monkeypatch.setattr(shards, "async_save", lambda *_, **__: lost)
    saved = saver.start(tmp_path / checkpoint_name(1), *state(1.0), lambda *_: None)
    assert isinstance(saved.exception(), RunFailed)


# Several workers

SCENES = """
import errno, threading
from pathlib import Path
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from orchestrator.training import trainer
from orchestrator.training.checkpoint import CheckpointWriteFailed
from orchestrator.workspace.layout import find_checkpoints

def train(name):
    return trainer.run_job(job.model_copy(update={"run_folder": f"{job.run_folder}-{name}"}),
                           world=world)

assert train("plain").finished

# The files of the first checkpoint are not whole before one more step is done.
write_data = HuggingFaceStorageWriter.write_data
update = torch.optim.AdamW.step
may_write = threading.Event()
num_steps = 0

def write_late(self, plan, planner):
    assert threading.current_thread() is not threading.main_thread()
    assert may_write.wait(120)
    return write_data(self, plan, planner)

def count_steps(*arguments):
    global num_steps
    update(*arguments)
    num_steps += 1
    if num_steps == 2 + 1:
        assert not find_checkpoints(job.folder.with_name(f"{job.folder.name}-late"))
        may_write.set()

HuggingFaceStorageWriter.write_data = write_late
torch.optim.AdamW.step = count_steps
assert train("late").finished
HuggingFaceStorageWriter.write_data = write_data
torch.optim.AdamW.step = update

# The disk of the third worker is full at the second checkpoint; all of them hear of it.
open_path = Path.open

def no_space(path, *arguments, **named):
    if "step_00000004" in str(path) and rank == "2":
        raise OSError(errno.ENOSPC, "no space left")
    return open_path(path, *arguments, **named)

Path.open = no_space
try:
    train("full")
except CheckpointWriteFailed as error:
    assert "step_00000002" in str(error) or rank != "0", error
else:
    raise AssertionError("it was written")
Path.open = open_path
assert train("full").finished
"""
"""The scenes that four workers play in place of one training."""


@pytest.mark.slow
def test_four_workers_train_on_while_they_write_and_outlive_the_full_disk_of_one(make_job):
    job = make_job(num_checkpoints_kept=9)
    training = next(line for line in WORKER.splitlines() if line.startswith("run_job("))
    arguments = worker_arguments(job, 4, "fsdp")
    run_workers(WORKER.replace(training, SCENES), 4, *arguments)
    plain, *disturbed_jobs = (in_folder(job, f"run-{name}") for name in ("plain", "late", "full"))
    expected = run_job(plain)
    for disturbed in disturbed_jobs:
        assert curve(disturbed) == curve(plain)
        assert state_of(run_job(disturbed)) == state_of(expected)
        assert steps_of(disturbed) == steps_of(plain) == [2, 4, 6]
        for checkpoint in find_checkpoints(disturbed.folder):
            assert weights_key(checkpoint) == weights_key(plain.folder / checkpoint.name)
            check_checkpoint(checkpoint, with_training_state=True)
    assert [event["step"] for event in events(disturbed_jobs[1], "resumed")] == [2]


RESAVED = """
from orchestrator.training.trainer import Trainer
trainer = Trainer(job, world, lambda: False, None, None, None)
trainer.prepare()
trainer.writer.resume_from(trainer.writer.checkpoint, 0)
trainer.writer.save(trainer.position, trainer.decoder, trainer.optimizer)
trainer.writer.finish()
trainer.close()
"""
"""Load the newest checkpoint, and save it again."""


@pytest.mark.slow
def test_any_number_of_workers_reads_exactly_what_others_wrote(make_job):
    job = make_job()
    workers(4, "fsdp", until=EVERY)(job)
    (checkpoint,) = find_checkpoints(job.folder)
    weights = (checkpoint / WEIGHTS).read_bytes()
    moments = str(optimizer_state(checkpoint))
    assert "exp_avg" in moments
    # The file is that of an unsharded training.
    write_folder(
        checkpoint.parent / "one file", load_config(checkpoint), load_file(checkpoint / WEIGHTS)
    )
    assert (checkpoint.parent / "one file" / WEIGHTS).read_bytes() == weights
    shutil.rmtree(checkpoint.parent / "one file")

    training = next(line for line in WORKER.splitlines() if line.startswith("run_job("))
    code = WORKER.replace(training, RESAVED)
    for number, num_shards in ((2, 2), (3, 3), (4, 2)):  # The last: two replicas.
        run_workers(code, number, *worker_arguments(job, number, "fsdp", num_shards))
        assert len(list(checkpoint.glob(f"{MOMENTS_PREFIX}-*-of-{number:05d}.safetensors"))) > 1
        assert (checkpoint / WEIGHTS).read_bytes() == weights
        assert str(optimizer_state(checkpoint)) == moments
    check_checkpoint(checkpoint, with_training_state=True)
    [*_, last] = checkpoint.glob(f"{MOMENTS_PREFIX}-*")
    last.write_bytes(b"cut off")
    check_checkpoint(checkpoint)
    with pytest.raises(DamagedFile, match=last.name):
        check_checkpoint(checkpoint, with_training_state=True)


WRITTEN = "temporary/step_00000004"
KILLS = {
    # An event, what it names -> the step that the next four resume after.
    ("os.remove", f"{WRITTEN}/rows-00002-of"): 2,
    ("os.rename", r"/step_00000002 .*/\.step_00000002"): 4,
}
MORE_KILLS = {
    ("step", "^3$"): 2,
    ("os.mkdir", WRITTEN): 2,
    # Written under other names, they are opened to compute checksums.
    ("open", f"{WRITTEN}/rows-00001-of"): 2,
    ("open", f"{WRITTEN}/moments-00003-of"): 2,
    ("open", f"{WRITTEN}/model.safetensors w"): 2,
    ("open", f"{WRITTEN}/config.json"): 2,
    ("open", f"{WRITTEN}/provenance.json"): 2,
    # Without a mode, to wait for the disk.
    ("open", f"{WRITTEN}/moments-00002-of[^ ]* None"): 2,
    ("os.rename", f"{WRITTEN} "): 2,
    **KILLS,
}


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(KILLS, marks=pytest.mark.slow, id="a few"),
        pytest.param(MORE_KILLS, marks=pytest.mark.long, id="all"),
    ],
)
def test_four_workers_killed_at_any_moment_go_on_from_their_last_whole_checkpoint(make_job, kills):
    job, undisturbed = (make_job(name, num_checkpoints_kept=1) for name in ("killed", "whole"))
    workers(4, "fsdp")(undisturbed)
    workers(4, "fsdp", until=EVERY)(job)
    for place in kills:
        kill_workers(4, *place)(job)
    workers(4, "fsdp")(job)
    assert [event["step"] for event in events(job, "resumed")] == [EVERY, *kills.values()]
    assert curve(job) == curve(undisturbed)
    assert state_of(run_job(job)) == state_of(run_job(undisturbed))
    assert steps_of(job) == [NUM_STEPS]
    assert not list(job.folder.glob(".*.iiet-temporary"))
