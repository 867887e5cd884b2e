"""`same_run(job, ...)`: a training that is disturbed ends like one that is not, to the last bit.

It also takes the FLOPs that were planned.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Started, run_workers
from safetensors.torch import load_file

from iiet.hf.weights import WEIGHTS
from orchestrator.cluster.task import run_local_jobs
from orchestrator.planning.estimate import Estimate
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.training.checkpoint import (
    CheckpointWriteFailed,
    load_optimizer,
    load_training_state,
)
from orchestrator.training.devices import decoder_to_train
from orchestrator.training.objective import make_optimizer
from orchestrator.training.trainer import run_job
from orchestrator.training.watching import remaining_flops
from orchestrator.training.world import World
from orchestrator.workspace.errors import Interrupted, RunFailed
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints

CURVES = (
    "train/loss", "train/gradient_norm", "train/tokens", "train/flops", "train/kl",
    "train/hidden", "train/full_loss", "train/cheaper_kl", "validation/loss",
    "validation/cheapest_loss", "validation/output_rms_0", "validation/output_rms_1",
)  # fmt: skip

Disturbance = Callable[[TrainingJob], TrainingJob | None]
"""Does something to a job's run before it is finished; may return the job with changes."""


def same_run(job: TrainingJob, *disturbances: Disturbance, rel: float = 0.0) -> TrainingJob:
    """Train a job alone, and disturbed in a folder beside it; return the disturbed one.

    Args:
        job: Its folder's name is extended; jobs of one name share the run that is not disturbed.
        disturbances: What happens before the last start, in this order.
        rel: Tolerance of the curves, where rounding differs; weights and moments then are near.
    """
    undisturbed = in_folder(job, f"{job.folder.name}-alone")
    names = (f"{job.folder.name}-{number}" for number in range(1000))
    unused_name = next(name for name in names if not (job.folder.parent / name).exists())
    disturbed = in_folder(job, unused_name)
    for disturb in disturbances:
        disturbed = disturb(disturbed) or disturbed
    expected = run_job(undisturbed)
    outcome = run_job(disturbed)
    assert outcome.finished
    assert not list(disturbed.folder.glob(".*.iiet-temporary"))
    for metric in CURVES:
        assert curve(disturbed, metric) == pytest.approx(
            curve(undisturbed, metric), rel=rel, abs=rel
        )
    for field in ("step", "num_tokens", "training_flops"):
        assert getattr(outcome, field) == getattr(expected, field)
    planned = replace(Estimate.of(undisturbed), steps_done=0)
    assert planned.num_tokens == expected.num_tokens
    assert planned.total_flops == pytest.approx(expected.training_flops)
    # The time left of a training that runs is told by these.
    assert remaining_flops(undisturbed)[0] == pytest.approx(expected.training_flops)
    if rel:
        near = {"rtol": 0.0, "atol": max(10 * rel, 1e-3)}
        torch.testing.assert_close(tensors_of(outcome), tensors_of(expected), **near)
    else:
        assert outcome.validation_loss == expected.validation_loss
        assert state_of(outcome) == state_of(expected)
    return disturbed


def in_folder(job: TrainingJob, name: str) -> TrainingJob:
    """Return a job in a folder of this name, beside its own."""
    return job.model_copy(update={"run_folder": str(job.folder.parent / name)})


def curve(job: TrainingJob, metric: str = "train/loss") -> dict[int, float]:
    """Return step, from 1 -> the latest value of a metric in a journal."""
    return {
        record["step"]: record["values"][metric]
        for record in read_journal(job.folder)[0]
        if metric in record.get("values", {})
    }


def events(job: TrainingJob, name: str) -> list[dict[str, Any]]:
    """Return the events of this name in a job's journal."""
    return [record for record in read_journal(job.folder)[0] if record.get("name") == name]


def steps_of(job: TrainingJob) -> list[int]:
    """Return the steps of a job's checkpoints."""
    return [int(path.name[5:]) for path in find_checkpoints(job.folder)]


def state_of(outcome: TrainingOutcome) -> tuple[bytes, dict[str, bytes]]:
    """Return the bytes of the last checkpoint's weights, and those of its tensors by name."""
    plain = {name: tensor.numpy().tobytes() for name, tensor in tensors_of(outcome).items()}
    return (Path(str(outcome.checkpoint)) / WEIGHTS).read_bytes(), plain


def tensors_of(outcome: TrainingOutcome) -> dict[str, torch.Tensor]:
    """Return the weights and the moments of the last checkpoint, by name."""
    folder = Path(str(outcome.checkpoint))
    tensors: dict[str, torch.Tensor] = {}
    for key, moments in optimizer_state(folder)["state"].items():
        tensors |= {f"{key} {name}": tensor for name, tensor in moments.items()}
    assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
    return tensors | load_file(folder / WEIGHTS)


def optimizer_state(checkpoint: Path) -> dict[str, Any]:
    """Return what one worker loads of an optimizer's state, which several may have saved."""
    job = TrainingJob.of_folder(checkpoint.parent)
    assert job is not None
    decoder = decoder_to_train(job, World(), checkpoint)
    optimizer = make_optimizer(decoder, job.recipe)
    stored = load_training_state(checkpoint)["optimizer"]
    load_optimizer(optimizer, decoder, checkpoint, stored)
    return optimizer.state_dict()


def stop_at(step: int) -> Callable[[], bool]:
    """Return a function that asks for a stop after so many steps of this process."""
    calls = iter(range(10**6))
    return lambda: next(calls) == step


def stop(step: int) -> Disturbance:
    """Stop after so many steps of a process."""

    def disturb(job: TrainingJob) -> None:
        outcome = run_job(job, should_stop=stop_at(step))
        assert not outcome.finished
        torch.manual_seed(step)  # Whatever else the process does in between.

    return disturb


@contextmanager
def called_in_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Call a function in the block, in the optimizer's step after so many."""
    update = torch.optim.AdamW.step

    def act_and_update(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        if num_updates(optimizer) == step:
            act()
        return update(optimizer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", act_and_update)
        yield


def num_updates(optimizer: torch.optim.Optimizer) -> int:
    """Return how many steps an optimizer has done, also before it was loaded."""
    steps = (int(state.get("step", 0)) for state in optimizer.state.values())  # Muon counts none.
    return max(steps, default=0)


def crash(step: int) -> Disturbance:
    """Fail in a step.

    Args:
        step: Steps that are done before.
    """

    def fail() -> None:
        raise RuntimeError("crash")

    def disturb(job: TrainingJob) -> None:
        with called_in_step(step, fail), pytest.raises(RuntimeError, match="crash"):
            run_job(job)

    return disturb


def press_ctrl_c(step: int, *, times: int = 1, on_full_disk: bool = False) -> Disturbance:
    """Press Ctrl-C in a step of a training without Ray, which saves its state and stops.

    Args:
        step: Steps that are done before.
        times: After the second time, it stops at once, with what was saved before.
        on_full_disk: Whether the state cannot be saved.
    """

    def press() -> None:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    def disturb(job: TrainingJob) -> None:
        handler = signal.getsignal(signal.SIGINT)
        expected_error = CheckpointWriteFailed if on_full_disk else Interrupted
        disk = small_files() if on_full_disk else nullcontext()
        with pytest.MonkeyPatch.context() as patch, called_in_step(step, press), disk:
            # One CPU, and so one thread.
            patch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
            with pytest.raises(expected_error) as caught:
                run_local_jobs([job])
        steps = steps_of(job)
        saved = f"saved at step {steps[-1]}" if steps else "nothing was saved"
        assert saved in str(caught.value)
        assert signal.getsignal(signal.SIGINT) is handler

    return disturb


def train(job: TrainingJob) -> None:
    """Train to the end."""
    assert run_job(job).finished


@contextmanager
def small_files() -> Iterator[None]:
    """Let files be so small in the block that no checkpoint fits, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(job: TrainingJob) -> None:
    """Train until the next checkpoint does not fit on the disk."""
    steps_before = steps_of(job)
    with small_files(), pytest.raises(RunFailed, match="could not be written") as caught:
        run_job(job)
    assert str(caught.value).endswith(str(find_checkpoints(job.folder)[-1]))
    assert steps_of(job) == steps_before
    assert not list(job.folder.glob(".*.iiet-temporary"))


EVENTS = """
import os, re, sys, torch
from pyarrow import fs
from same_run import num_updates

update = torch.optim.AdamW.step
copy_files = fs.copy_files

def audited_update(optimizer, *arguments):
    sys.audit("step", num_updates(optimizer))
    return update(optimizer, *arguments)

def audited_copy(source, target, **options):
    sys.audit("copy", source, target)
    return copy_files(source, target, **options)

torch.optim.AdamW.step = audited_update
fs.copy_files = audited_copy

def call_at(event, pattern, act):
    def hook(name, arguments):
        if name == event and re.search(pattern, " ".join(map(str, arguments))):
            act()

    sys.addaudithook(hook)
"""
"""Calls a function at an event that Python tells of, such as `open` or `os.rename`, whose arguments
have a pattern; also at each `step`, with the number of those before, and `copy` to a storage."""

KILLED = f"""{EVENTS}
import signal
from orchestrator.records.training import TrainingJob
from orchestrator.training.trainer import run_job

event, pattern, job = sys.argv[1:]
call_at(event, pattern, lambda: os.kill(os.getpid(), signal.SIGKILL))
run_job(TrainingJob.model_validate_json(job))
"""


def kill(event: str, pattern: str) -> Disturbance:
    """Kill a process of its own at an event of `EVENTS`."""

    def disturb(job: TrainingJob) -> None:
        process = Started(event, pattern, job.model_dump_json(), code=KILLED)
        printed, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, printed

    return disturb


def damage(name: str, content: bytes = b"cut off") -> Disturbance:
    """Replace a file of the newest checkpoint."""

    def disturb(job: TrainingJob) -> None:
        (find_checkpoints(job.folder)[-1] / name).write_bytes(content)

    return disturb


def recipe(**changes: Any) -> Disturbance:
    """Train with another recipe, whose changes are not part of the key."""
    return lambda job: job.model_copy(update={"recipe": job.recipe.model_copy(update=changes)})


WORKER = """
import os, sys, torch
from orchestrator.records.training import TrainingJob
from orchestrator.training.world import World
from orchestrator.training.trainer import run_job

rank, number, parallel, shards, until, meeting, job = sys.argv[1:]
torch.set_num_threads(1)
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
address = {"init_method": f"file://{meeting}", "rank": int(rank), "world_size": int(number)}
# BEFORE
torch.distributed.init_process_group("gloo", **address)
world = World(rank=int(rank), size=int(number), parallel=parallel, shards=int(shards) or None)
calls = iter(range(10**6))
job = TrainingJob.model_validate_json(job)
run_job(job, world=world, should_stop=lambda: next(calls) == int(until))
torch.distributed.destroy_process_group()
"""


def workers(
    number: int, parallel: str = "ddp", *, shards: int = 0, until: int = -1, before: str = ""
) -> Disturbance:
    """Train on several workers: to the end, or until so many steps of theirs.

    Args:
        number: How many.
        parallel: `ddp` or `fsdp`.
        shards: Workers that share one copy of the model; all with `fsdp`, when unset.
        until: Steps after which they stop.
        before: A Python text that each of them runs first; it may change `address`.
    """

    def disturb(job: TrainingJob) -> None:
        arguments = worker_arguments(job, number, parallel, shards, until)
        run_workers(WORKER.replace("# BEFORE", before), number, *arguments)

    return disturb


MEETINGS = count()


def worker_arguments(
    job: TrainingJob, number: int, parallel: str, shards: int = 0, until: int = -1
) -> list[str]:
    """Return the arguments of `WORKER` after the rank; each call has another place to meet."""
    job.folder.parent.mkdir(exist_ok=True)
    meeting = f"{job.folder}-meeting-{next(MEETINGS)}"
    return [*map(str, (number, parallel, shards, until, meeting)), job.model_dump_json()]


KILLED_TOGETHER = f"""{EVENTS}
import signal
from pathlib import Path

Path(f"{{meeting}}-pid-{{rank}}").write_text(str(os.getpid()))

def kill_all():
    others = {{int(Path(f"{{meeting}}-pid-{{n}}").read_text()) for n in range(int(number))}}
    for pid in [*others - {{os.getpid()}}, os.getpid()]:
        os.kill(pid, signal.SIGKILL)

call_at(EVENT, PATTERN, kill_all)
"""


def kill_workers(number: int, event: str, pattern: str) -> Disturbance:
    """Kill all workers of a sharded model at an event of `EVENTS` in one of them."""
    before = KILLED_TOGETHER.replace("EVENT", repr(event)).replace("PATTERN", repr(pattern))

    def disturb(job: TrainingJob) -> None:
        code = WORKER.replace("# BEFORE", before)
        arguments = worker_arguments(job, number, "fsdp")
        started = [Started(str(rank), *arguments, code=code) for rank in range(number)]
        for process in started:
            printed, _ = process.communicate()
            assert process.returncode == -signal.SIGKILL, printed

    return disturb
