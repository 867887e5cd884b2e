"""Checkpoints are complete or absent, whatever happens while a thread writes and uploads them."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from same_run import events, kill, state_of, steps_of, stop_at, workers

from orchestrator.models.folder import check_checkpoint
from orchestrator.records.training import TrainingJob
from orchestrator.training import checkpoint as checkpoint_module
from orchestrator.training import uploads
from orchestrator.training.checkpoint import HostBuffers
from orchestrator.training.job import job_key
from orchestrator.training.trainer import run_job
from orchestrator.training.uploads import CheckpointUploads
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.files import VERIFIED_NAME
from orchestrator.workspace.layout import PROVENANCE, checkpoint_name, find_checkpoints, step_of

RECIPE = {"num_steps": 8, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every_steps": 2}


# The thread that writes


def test_training_continues_while_a_checkpoint_is_written(make_job, monkeypatch):
    plain = make_job("plain", num_steps=6)
    run_job(plain)
    save = torch.save  # Writes a part of each checkpoint.
    may_write = threading.Event()
    job = make_job("slow", num_steps=6)
    steps = list[int]()

    def slow(*arguments: Any, **named: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert may_write.wait(60)
        save(*arguments, **named)

    def report(step: int, numbers: Any) -> None:
        if "train/loss" in numbers:
            steps.append(step)
        if step == 4:  # The checkpoint of step 2 is delayed until here; the next one waits.
            assert steps_of(job) == []
            may_write.set()

    monkeypatch.setattr(torch, "save", slow)
    outcome = run_job(job, report=report)
    assert steps == list(range(1, 7))
    for path in find_checkpoints(job.folder):
        check_checkpoint(path, with_training_state=True)
        delayed = outcome.model_copy(update={"checkpoint": str(path)})
        undelayed = delayed.model_copy(update={"checkpoint": str(plain.folder / path.name)})
        assert state_of(delayed) == state_of(undelayed), (
            "a checkpoint holds the state of its own step"
        )


def test_a_copy_holds_the_state_of_its_time_in_memory_that_the_next_one_uses_again():
    buffers = HostBuffers(is_pinned=False)
    weight = torch.ones(3, requires_grad=True)
    state = {"weights": {"a": weight}, "groups": [{"rate": 0.1, "step": torch.tensor(1.0)}]}
    copied = buffers.copy(state)
    with torch.no_grad():
        weight.zero_()
    assert copied["weights"]["a"].tolist() == [1.0, 1.0, 1.0]
    assert copied["groups"][0] == {"rate": 0.1, "step": torch.tensor(1.0)}
    copied_again = buffers.copy(state)
    assert copied_again["weights"]["a"] is copied["weights"]["a"]
    assert copied["weights"]["a"].tolist() == [0.0, 0.0, 0.0]


def test_a_checkpoint_is_also_written_after_some_minutes(make_job, monkeypatch):
    seldom = {"checkpoint_every_steps": 100, "num_checkpoints_kept": 9}
    clock = iter(range(0, 10**6, 45))  # Seconds; read once for each step and when saving.
    # Only this module gets the clock, because threads of other tests may read the time, too.
    watch = SimpleNamespace(
        monotonic=lambda: float(next(clock)), perf_counter=checkpoint_module.time.perf_counter
    )
    monkeypatch.setattr(checkpoint_module, "time", watch)
    run_job(make_job("timed", checkpoint_every_minutes=1.5, **seldom))
    assert steps_of(make_job("timed")) == [1, 3, 5, 7, 8]


# Uploads to the run's storage


def on_machine(job: TrainingJob, machine: str, storage: Path | str) -> TrainingJob:
    """Return a job in the run folder of a machine, with a storage."""
    folder = job.folder.parent / machine / "run"
    return job.model_copy(update={"run_folder": str(folder), "storage": str(storage)})


def store_of(job: TrainingJob) -> Path:
    return Path(str(job.storage)) / f"run-{job_key(job)}"


def test_another_machine_resumes_from_whole_uploads(make_job, tmp_path):
    storage = tmp_path / "store"
    plain = make_job(num_steps=6, num_checkpoints_kept=2)
    lost, new, third = (on_machine(plain, name, storage) for name in ("lost", "new", "third"))
    run_job(lost, should_stop=stop_at(4))
    assert [path.name[-1] for path in find_checkpoints(store_of(lost))] == ["2", "4"]
    outcome = run_job(on_machine(plain, "new", storage.as_uri()))
    assert [event["step"] for event in events(new, "resumed")] == [4]
    assert state_of(outcome) == state_of(run_job(plain))
    uploaded = find_checkpoints(store_of(new))
    assert [path.name[-1] for path in uploaded] == ["4", "6"], "those of pruned ones are deleted"

    (uploaded[1] / "model.safetensors").write_bytes(b"spoilt")
    half = uploaded[1].with_name("step_00000009")
    shutil.copytree(uploaded[0], half)
    (half / PROVENANCE).unlink()
    run_job(third)
    assert [event["step"] for event in events(third, "resumed")] == [4]
    assert "earlier upload" in events(third, "damaged")[0]["text"]


def test_runs_of_one_name_share_a_storage_and_take_only_their_own_uploads(make_job, tmp_path):
    storage = tmp_path / "store"
    jobs = [make_job(seed=n, num_steps=2) for n in (0, 1)]
    of_seed_0, of_seed_1 = (on_machine(jobs[n], f"seed {n}", storage) for n in (0, 1))
    run_job(of_seed_0)
    before = sorted(storage.rglob("*"))
    run_job(of_seed_1)
    assert not events(of_seed_1, "resumed")
    assert set(before) <= set(storage.rglob("*")), "nothing of the other is deleted"
    shutil.rmtree(store_of(of_seed_1))
    store_of(of_seed_0).rename(store_of(of_seed_1))  # A person may do so by hand.
    of_new_machine = on_machine(jobs[1], "new", storage)
    run_job(of_new_machine)
    assert not events(of_new_machine, "resumed")
    assert "another training" in events(of_new_machine, "damaged")[0]["text"]


def test_an_upload_that_is_interrupted_leaves_no_copy_to_resume_from_and_goes_on_where_it_was(
    make_job, tmp_path, monkeypatch
):
    from pyarrow import fs

    job = make_job(num_steps=2)
    run_job(job)
    [checkpoint] = find_checkpoints(job.folder)
    files = {path.name for path in checkpoint.iterdir() if path.name != VERIFIED_NAME}
    copy_files = fs.copy_files
    notes = list[str]()

    def note(name: str, **_: object) -> None:
        notes.append(name)

    for number in range(len(files)):  # The upload ends before this file.
        copied = list[str]()

        def copy(
            source: str, target: str, *, copied: list[str] = copied, last: int = number, **more: Any
        ) -> None:
            if len(copied) == last:
                raise OSError("the connection is lost")
            copied.append(Path(target).name)
            copy_files(source, target, **more)

        store = tmp_path / f"store {number}"
        remote = CheckpointUploads(str(store), job.folder, job_key(job))
        new = CheckpointUploads(str(store), tmp_path / "new" / job.folder.name, job_key(job))
        notes.clear()
        with monkeypatch.context() as patched:
            patched.setattr(fs, "copy_files", copy)
            remote.start(note, num_kept=2)
            remote.wait()
            assert notes == ["not uploaded"]
            assert len(copied) == number
            assert new.download(pytest.fail) is None
            # The next one sends the rest, each file once.
            patched.setattr(copy, "__kwdefaults__", {"copied": copied, "last": -1})
            remote.start(note, num_kept=2)
            remote.wait()
        assert notes == ["not uploaded", "uploaded"]
        assert sorted(copied) == sorted(files)
        [copied_checkpoint] = find_checkpoints(store / store_of(job).name)
        assert {path.name for path in copied_checkpoint.iterdir()} == files
        remote.close()


def test_what_was_sent_of_another_checkpoint_of_that_step_is_sent_again(make_job, tmp_path):
    job = make_job(num_steps=2)
    run_job(job)
    [checkpoint] = find_checkpoints(job.folder)
    remote = CheckpointUploads(str(tmp_path / "store"), job.folder, job_key(job))
    copied_checkpoint = tmp_path / "store" / store_of(job).name / checkpoint.name
    copied_checkpoint.mkdir(parents=True)
    for path in checkpoint.iterdir():  # The files that were sent have the same sizes.
        if path.name != PROVENANCE:
            (copied_checkpoint / path.name).write_bytes(bytes(path.stat().st_size))
    other_provenance = bytes((checkpoint / PROVENANCE).stat().st_size)
    (copied_checkpoint / uploads.BEGUN).write_bytes(other_provenance)
    remote.start(lambda *_, **__: None, num_kept=2)
    remote.wait()
    remote.close()
    check_checkpoint(copied_checkpoint, with_training_state=True)


def test_copies_of_another_machine_stay_and_a_damaged_checkpoint_is_not_copied(make_job, tmp_path):
    plain = make_job(num_checkpoints_kept=2)
    newer = on_machine(plain, "newer", tmp_path / "store")
    run_job(newer)
    older = on_machine(plain, "older", tmp_path / "elsewhere")
    run_job(older, should_stop=stop_at(4))
    notes = list[str]()

    def note(name: str, **_: object) -> None:
        notes.append(name)

    def send(folder: Path, **kept: Any) -> list[int]:
        """Let a machine with this run folder send what is missing; return the steps of uploads."""
        remote = CheckpointUploads(str(tmp_path / "store"), folder, job_key(plain))
        remote.start(note, **kept)
        remote.wait()
        remote.close()
        return [step_of(path) for path in find_checkpoints(store_of(newer))]

    assert send(older.folder, num_kept=2) == [2, 4, 6, 8], "it was behind: those of the other stay"
    fresh = tmp_path / "fresh" / "run"
    last = find_checkpoints(store_of(newer))[-1]
    shutil.copytree(last, fresh / last.name)
    assert send(fresh, num_kept=2, names_kept=[checkpoint_name(2)]) == [2, 6, 8]
    assert notes == ["uploaded", "uploaded"]

    damaged = fresh / checkpoint_name(9)
    shutil.copytree(last, damaged)
    (damaged / "model.safetensors").write_bytes(b"spoilt")
    assert send(fresh, num_kept=2, names_kept=[checkpoint_name(2)]) == [2, 6, 8]
    assert notes[2:] == ["not uploaded"]


def test_uploads_hold_neither_steps_nor_checkpoints_and_keep_what_they_send(
    make_job, tmp_path, monkeypatch
):
    from pyarrow import fs

    job = on_machine(make_job(num_checkpoints_kept=1), "one", tmp_path / "store")
    copy_files = fs.copy_files
    began = threading.Event()
    may_go_on = threading.Event()

    def copy(source: str, target: str, **more: Any) -> None:
        began.set()
        assert may_go_on.wait(60)
        copy_files(source, target, **more)

    def report(step: int, numbers: Any) -> None:
        if "train/loss" not in numbers:
            return
        if step == 3:
            assert began.wait(60), "the copy of step 2 has begun"
        if step == 7:  # The checkpoint of step 4 was complete before that of step 6 was begun.
            assert steps_of(job)[0] == 2
            assert steps_of(job)[-1] in (4, 6)
            assert not events(job, "uploaded")
            may_go_on.set()

    monkeypatch.setattr(fs, "copy_files", copy)
    assert run_job(job, report=report).finished
    assert [event["step"] for event in events(job, "checkpoint")] == [2, 4, 6, 8]
    uploaded = [event["step"] for event in events(job, "uploaded")]
    assert (uploaded[0], uploaded[-1]) == (2, 8)
    assert steps_of(job) == [8]
    assert [path.name[-1] for path in find_checkpoints(store_of(job))] == ["8"]


@pytest.mark.slow
def test_an_upload_that_is_killed_is_finished_by_the_next_run(make_job, tmp_path):
    job = on_machine(make_job(num_steps=4), "one", tmp_path / "store")
    last = store_of(job) / "step_00000004"
    # The upload of the last checkpoint is killed after one of its files.
    kill("copy", str(last / "model.safetensors"))(job)
    assert not (last / "model.safetensors").exists()
    assert (last / "config.json").exists()
    times = {path: path.stat().st_mtime_ns for path in last.iterdir()}
    assert run_job(job).finished
    assert [event["step"] for event in events(job, "resumed")] == [4]
    check_checkpoint(last, with_training_state=True)
    assert (last / "config.json").stat().st_mtime_ns == times[last / "config.json"]


def test_a_deletion_that_is_interrupted_leaves_no_copy_to_resume_from(make_job, tmp_path):
    job = on_machine(make_job(num_steps=4), "one", tmp_path / "store")
    run_job(job)
    old, newest = find_checkpoints(store_of(job))
    shutil.rmtree(find_checkpoints(job.folder)[0])

    remote = CheckpointUploads(str(job.storage), job.folder, job_key(job))
    storage = remote._store

    def delete_dir(path: str) -> None:
        storage.delete_file(f"{path}/model.safetensors")
        raise OSError("the connection is lost")

    remote._store = SimpleNamespace(
        get_file_info=storage.get_file_info, delete_file=storage.delete_file, delete_dir=delete_dir
    )
    notes = list[str]()
    remote.start(lambda name, **_: notes.append(name), num_kept=1)
    remote.close()
    assert notes == ["not uploaded"]
    assert old.is_dir()
    shutil.rmtree(newest)
    on_new_machine = CheckpointUploads(
        str(job.storage), tmp_path / "new" / job.folder.name, job_key(job)
    )
    assert on_new_machine.download(pytest.fail) is None


def test_a_storage_that_refuses_does_not_stop_training(make_job, tmp_path):
    job = on_machine(make_job(num_steps=4), "one", tmp_path / "store")
    store = store_of(job)
    store.parent.mkdir()
    store.write_text("a file where the folder would be")
    with pytest.raises(RunFailed, match="does not answer"):
        run_job(job)
    store.unlink()

    def in_the_way(step: int, numbers: object) -> None:
        if step == 1:
            store.write_text("in the way")

    assert run_job(job, report=in_the_way).finished
    assert "training continues" in events(job, "not uploaded")[0]["text"]


UPLOAD_THAT_WAITS = """
import time
from datetime import timedelta
from types import SimpleNamespace
from orchestrator.training import devices, uploads

send = uploads.send

def shared():
    return torch.distributed.distributed_c10d._get_default_store()

def look_again(seconds):  # The other worker, between two looks for the end of the upload.
    if shared().check(["the upload has begun"]):
        shared().set("the other worker looks for its end", "")
    time.sleep(seconds)

def send_slowly(*arguments):
    shared().set("the upload has begun", "")
    shared().wait(["the other worker looks for its end"], timedelta(seconds=60))
    send(*arguments)

uploads.send = send_slowly
devices.time = SimpleNamespace(sleep=look_again)
"""


@pytest.mark.slow
def test_uploads_may_take_longer_than_workers_wait_for_each_other(make_job, tmp_path):
    # The limit holds for collective operations. So no worker may be in one during an upload.
    job = on_machine(make_job(num_steps=2), "slow", tmp_path / "store")
    workers(2, before=UPLOAD_THAT_WAITS)(job)
    assert len(find_checkpoints(store_of(job))) == 1
