"""The overhead of the orchestrator's training loop, and of checkpoints of a sharded model.

Three questions, at steps of about half a second: how much longer is a step than that of a plain
PyTorch loop on the same weights and batches; what does a checkpoint cost at a given interval; what
share of a step waits for its batch. The losses of both loops must be bitwise equal before anything
is timed.

Then four workers share a model (gloo) and train the same steps with and without a checkpoint
halfway, in turns: each writes its own rows while training goes on.

A step's time is from one report of the loss to the next, so everything between two steps counts,
but nothing before the first or after the last.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.report import RATIO, Goal, Row, checked, milliseconds
from benchmarks.runner import Setup
from benchmarks.shape import shaped_config
from benchmarks.timing import paired_ratio, take_turns
from iiet.decoder import Decoder
from iiet.model.batch import Batch
from iiet.model.losses import next_token_loss
from orchestrator.data.mixture import open_data
from orchestrator.data.text import DOCUMENT_MARK
from orchestrator.data.tokenize import write_text
from orchestrator.records.training import TrainingJob
from orchestrator.settings import DataSettings, TrainingSettings
from orchestrator.terminal.progress import Progress
from orchestrator.training.job import sequences_per_step
from orchestrator.training.objective import make_optimizer, set_learning_rate
from orchestrator.training.schedules import learning_rate_at
from orchestrator.training.trainer import run_job
from orchestrator.training.world import World
from orchestrator.workspace.journal import read_journal


@dataclass(frozen=True, kw_only=True)
class _Size:
    dim: int = 256
    num_layers: int = 6
    vocab_size: int = 4096
    context_length: int = 128
    num_sequences: int = 4
    """Sequences of one step."""
    num_steps: int = 9
    """Steps of one run."""


_FULL = _Size()
_QUICK = _Size(dim=32, num_layers=2, vocab_size=512, context_length=16, num_steps=5)
_SHARED = _Size(num_sequences=8, num_steps=17)
"""Steps that four workers share."""
_CHECKPOINT_EVERY = 2
"""Steps between checkpoints in the measured runs."""
_NUM_WORKERS = 4
_INTERVAL = 200
"""Steps between checkpoints for which the share is computed; the recipe's default."""


def training(setup: Setup) -> Iterator[Row]:
    """Measure the overhead of the loop."""
    size, repetitions = (_QUICK, 2) if setup.is_toy else (_FULL, 4)
    runs = _Runs(size, setup.folder)
    yield Row(
        what=f"IIET r = 1, d {size.dim}, {size.num_layers} layers, vocabulary {size.vocab_size}, "
        f"{size.num_sequences} x {size.context_length} tokens a step, float32, runs of "
        f"{size.num_steps} steps in turns, {repetitions} repetitions; a step is from one report of "
        "the loss to the next, without validation"
    )
    pairs = zip(runs.ours().losses, runs.bare().losses, strict=True)
    largest = max(abs(a - b) for a, b in pairs)
    yield checked("losses of the whole loop and of a bare one", largest, 0.0)

    tasks: dict[str, Callable[[], _Steps]] = {
        "whole": runs.ours,
        "bare": runs.bare,
        "saving": lambda: runs.ours(checkpoint_every_steps=_CHECKPOINT_EVERY),
    }
    found = take_turns(tasks, repetitions=repetitions)
    step = {name: [run.median for run in found[name]] for name in tasks}
    overhead, batch = (None if setup.is_toy else Goal("at most", limit) for limit in (1.03, 0.01))
    yield Row.paired("a step of the whole loop, of a bare one", step, "whole", "bare", overhead)
    # The last checkpoint comes after the last step's report.
    num_saved = (size.num_steps - 1) // _CHECKPOINT_EVERY
    stalls = [
        (sum(saving.seconds) - sum(whole.seconds)) / num_saved
        for saving, whole in zip(found["saving"], found["whole"], strict=True)
    ]
    interval = [_INTERVAL * seconds for seconds in step["whole"]]
    with_save = [a + max(stall, 0.0) for a, stall in zip(interval, stalls, strict=True)]
    yield Row(
        what=f"{_INTERVAL} steps with one checkpoint / without",
        figures={
            "checkpoint (ms)": milliseconds(stalls), RATIO: paired_ratio(with_save, interval)
        },
    )  # fmt: skip
    step["batch"] = [runs.loading() for _ in range(repetitions)]
    yield Row.paired("a step's batch from the tokens, the step", step, "batch", "whole", batch)


def saving(setup: Setup) -> Iterator[Row]:
    """Measure what a checkpoint costs the steps of workers that share a model."""
    size, repetitions = (_QUICK, 1) if setup.is_toy else (_SHARED, 5)
    runs = _Runs(size, setup.folder)
    jobs = {"plain": runs.job(), "saving": runs.job(checkpoint_every_steps=-(-size.num_steps // 2))}
    answer = setup.folder / "saving.json"
    stored = {name: job.model_dump_json() for name, job in jobs.items()}
    meeting = setup.folder / "saving-meeting"
    arguments = (str(meeting), stored, repetitions, str(answer))
    multiprocessing: Any = torch.multiprocessing
    multiprocessing.spawn(_save_in_turns, arguments, nprocs=_NUM_WORKERS)
    found = json.loads(answer.read_text(encoding="utf-8"))
    yield checked("losses with and without checkpoints", found["difference"], 0.0)
    what = f"{size.num_steps - 1} steps of {_NUM_WORKERS} workers"
    goal = None if setup.is_toy else Goal("at most", 1.05)
    yield Row.paired(f"{what} with a checkpoint, without", found, "saving", "plain", goal)
    share = paired_ratio(found["waited"], found["plain"])
    goal = None if setup.is_toy else Goal("at most", 0.05)
    waited = milliseconds(found["waited"])
    yield Row(
        what=f"the wait for its copy, {what}",
        figures={"wait (ms)": waited, RATIO: share},
        goal=goal,
    )


def _save_in_turns(
    rank: int, meeting: str, stored: Mapping[str, str], repetitions: int, answer: str
) -> None:
    """Train both jobs in turns, as one of the workers; the first one writes seconds by job."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=_NUM_WORKERS
    )
    world = World(rank=rank, size=_NUM_WORKERS, parallel="fsdp")
    losses: dict[str, list[float]] = {}
    waited: list[float] = []
    number = count()

    def run(name: str) -> float:
        job = TrainingJob.model_validate_json(stored[name])
        job = job.model_copy(update={"run_folder": f"{job.run_folder}-{next(number)}"})
        times: list[float] = []
        losses[name] = []

        def report(_: int, numbers: Mapping[str, float]) -> None:
            if "train/loss" in numbers:
                times.append(time.perf_counter())
                losses[name].append(numbers["train/loss"])

        run_job(job, world=world, report=report)
        if rank == 0 and name == "saving":
            records, _ = read_journal(job.folder)
            saved = [record for record in records if record.get("name") == "checkpoint"]
            waited.append(saved[0]["waited_seconds"])  # The last one comes after the last report.
        return times[-1] - times[0] if times else 0.0

    seconds = take_turns({name: partial(run, name) for name in stored}, repetitions=repetitions)
    if rank == 0:
        pairs = zip(losses["plain"], losses["saving"], strict=True)
        difference = max(abs(plain - saving) for plain, saving in pairs)
        found = {**seconds, "waited": waited[-repetitions:], "difference": difference}
        Path(answer).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


@dataclass(frozen=True)
class _Steps:
    """The measurements of a run."""

    seconds: list[float]
    """Seconds of each step except the first."""
    losses: list[float]

    @property
    def median(self) -> float:
        """Robust against steps that the system disturbed."""
        return statistics.median(self.seconds)


class _Runs:
    """Runs of one size on made-up text; `folder` holds tokens and runs."""

    def __init__(self, size: _Size, folder: Path) -> None:
        self.size = size
        self.folder = folder
        draw = random.Random(0)
        letters = "abcdefghijklmnop"
        words = ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(500)]
        texts = [" ".join(draw.choices(words, k=400)) for _ in range(400)]
        file = folder / "made-up.txt"
        file.write_text(DOCUMENT_MARK.join(texts))
        settings = DataSettings(source="files", files=(str(file),), vocab_size=300)
        self.tokens = write_text(settings, folder / "tokens", "text", Progress())
        self._numbers = count()

    def job(self, *, checkpoint_every_steps: int | None = None) -> TrainingJob:
        """Return a job with a new folder."""
        size = self.size
        shape = size.dim, size.num_layers, size.vocab_size, size.context_length
        return TrainingJob(
            run_folder=str(self.folder / f"run-{next(self._numbers)}"),
            tokens_folder=str(self.tokens),
            model=shaped_config(*shape, schedule=1),
            recipe=TrainingSettings(
                num_steps=size.num_steps,
                num_tokens_per_step=size.num_sequences * size.context_length,
                iterate_from_fraction=0.0,
                validate_every_steps=size.num_steps,
                num_validation_tokens=size.context_length,
                checkpoint_every_steps=checkpoint_every_steps or size.num_steps,
            ),
        )

    def ours(self, *, checkpoint_every_steps: int | None = None) -> _Steps:
        """Run the whole loop, with batches from the memory-mapped tokens, journal and checks."""
        times: list[float] = []
        losses: list[float] = []

        def report(_: int, numbers: Mapping[str, float]) -> None:
            if "train/loss" in numbers:
                times.append(time.perf_counter())
                losses.append(numbers["train/loss"])

        run_job(self.job(checkpoint_every_steps=checkpoint_every_steps), report=report)
        return _Steps([b - a for a, b in pairwise(times)], losses)

    def bare(self) -> _Steps:
        """Run the same steps in a dozen lines of plain PyTorch."""
        job = self.job()
        recipe = job.recipe
        torch.manual_seed(recipe.seed)
        decoder = Decoder(job.model).train()
        optimizer = make_optimizer(decoder, recipe)
        batches = [self.batch(job, step).input_ids for step in range(recipe.num_steps)]
        times: list[float] = []
        losses: list[float] = []
        for step, input_ids in enumerate(batches):
            set_learning_rate(optimizer, learning_rate_at(step, recipe))
            loss = next_token_loss(decoder(input_ids), input_ids)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(decoder.parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            times.append(time.perf_counter())
        return _Steps([b - a for a, b in pairwise(times)], losses)

    def batch(self, job: TrainingJob, step: int) -> Batch:
        """Return the batch of a step, read as the loop reads it."""
        return open_data(job.tokens_folder).batch(
            step,
            context_length=job.model.context_length,
            seed=job.recipe.seed,
            global_batch=sequences_per_step(job.recipe, job.model),
        )

    def loading(self) -> float:
        """Return the seconds that the loop spends on one step's batch."""
        job = self.job()
        started = time.perf_counter()
        for step in range(self.size.num_steps):
            self.batch(job, step)
        return (time.perf_counter() - started) / self.size.num_steps
