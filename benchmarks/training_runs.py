"""The same training in three forms, with the time of each step.

`bare`: a dozen lines of plain PyTorch on the same weights and batches. `ours`: the whole loop as
`iiet-orch pretrain` runs it, with batches from the memory-mapped tokens, journal and stop checks.
`workers`: ours in separate processes that average their gradients. A step's time is from one report
of the loss to the next, so everything between two steps counts, but nothing before the first or
after the last.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

import torch
from torch import nn

from benchmarks.shape import shaped_config
from iiet.batch import Batch
from iiet.decoder import Decoder
from iiet.losses import next_token_loss
from orchestrator.data.corpus import Document
from orchestrator.data.sources import open_data
from orchestrator.data.tokenization import write_tokens
from orchestrator.records.training import TrainingJob
from orchestrator.settings import DataSettings, TrainingSettings
from orchestrator.training.job import sequences_per_step
from orchestrator.training.learning_rate import learning_rate_at
from orchestrator.training.optimizer import make_optimizer, set_learning_rate
from orchestrator.training.run import run_job
from orchestrator.workspace.journal import read_journal

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """The size of a model and of its training."""

    dim: int
    num_layers: int
    vocab_size: int
    context_length: int
    num_sequences: int
    """Sequences of one step."""
    num_steps: int
    """Steps of one run."""


@dataclass(frozen=True)
class Steps:
    """The measurements of a run."""

    seconds: list[float]
    """Seconds of each step except the first."""
    losses: list[float]


class Runs:
    """Runs of one size on made-up text; `folder` holds tokens and runs."""

    def __init__(self, size: RunSize, folder: Path) -> None:
        self.size, self.folder = size, folder
        settings = DataSettings(vocab_size=300)
        self.tokens = write_tokens(folder / "tokens", _documents(), settings, resume_key="text")
        self._numbers = count()

    def job(self, *, checkpoint_every_steps: int | None = None) -> TrainingJob:
        """Return a job with a new folder."""
        size = self.size
        config = shaped_config(
            size.dim,
            num_layers=size.num_layers,
            vocab_size=size.vocab_size,
            context_length=size.context_length,
            num_corrections=1,
        )
        return TrainingJob(
            run_folder=str(self.folder / f"run-{next(self._numbers)}"),
            tokens_folder=str(self.tokens),
            model=config,
            recipe=TrainingSettings(
                num_steps=size.num_steps,
                num_tokens_per_step=size.num_sequences * size.context_length,
                iterate_from_fraction=0.0,
                validate_every_steps=size.num_steps,
                num_validation_tokens=size.context_length,
                checkpoint_every_steps=checkpoint_every_steps or size.num_steps,
            ),
        )

    def ours(self, *, checkpoint_every_steps: int | None = None) -> Steps:
        """Run the whole loop."""
        times: list[float] = []
        losses: list[float] = []

        def report(_: int, numbers: Mapping[str, float]) -> None:
            if "train/loss" in numbers:
                times.append(time.perf_counter())
                losses.append(numbers["train/loss"])

        run_job(self.job(checkpoint_every_steps=checkpoint_every_steps), report=report)
        return Steps([b - a for a, b in pairwise(times)], losses)

    def bare(self) -> Steps:
        """Run the same steps in a plain loop."""
        job = self.job()
        config, recipe = job.model, job.recipe
        torch.manual_seed(recipe.seed)
        decoder = Decoder(config).train()
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
        return Steps([b - a for a, b in pairwise(times)], losses)

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

    def workers(self, num_workers: int) -> Steps:
        """Run the whole loop in processes of one thread each.

        Raises:
            RuntimeError: a process failed; the message holds the end of its error output.
        """
        job = self.job()
        job.folder.mkdir()
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.training_worker", str(rank), str(num_workers)],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=_ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(num_workers)
        ]
        request = json.dumps(
            {"job": job.model_dump(mode="json"), "meeting": str(self.folder / job.folder.name)}
        )
        for process in processes:
            assert process.stdin
            process.stdin.write(request)
            process.stdin.close()
            process.stdin = None
        errors = [process.communicate()[1] for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError(f"{num_workers} workers failed: {''.join(errors)[-2000:]}")
        records = [
            record["values"]
            for record in read_journal(job.folder)[0]
            if "train/loss" in record.get("values", {})
        ]
        tokens = job.recipe.num_tokens_per_step
        return Steps(
            [tokens / values["train/tokens_per_second"] for values in records[1:]],
            [values["train/loss"] for values in records],
        )


def _documents() -> list[Document]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(500)]
    return [Document(" ".join(draw.choices(words, k=400)), "made up") for _ in range(400)]
