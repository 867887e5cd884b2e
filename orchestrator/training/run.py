"""Runs a training job from whatever is on disk to its end.

`run_job` is idempotent. A finished job returns at once; an unfinished one goes on from its newest
whole checkpoint, and the result is the same as if nothing had happened. Only the first worker
touches files, and what it finds there is told to the others. A lock keeps two processes out of one
folder: the workers of a driver that was killed outlive it by seconds, and a second start by mistake
must not mix two runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from iiet.batch import Batch
from orchestrator.data.batches import BatchPlan, validation_batches
from orchestrator.data.token_store import open_tokens
from orchestrator.training.checkpoint import load_decoder, load_training_state
from orchestrator.training.checkpoint_lookup import newest_checkpoint
from orchestrator.training.checkpoint_writer import CheckpointWriter, set_random_state
from orchestrator.training.compiling import compile_fields
from orchestrator.training.distributed import World, replicate, run_on_first
from orchestrator.training.job import (
    DONE_NAME,
    TrainingJob,
    TrainingOutcome,
    check_job,
    finished_outcome,
    is_stop_requested,
    sequences_per_step,
    write_job_file,
)
from orchestrator.training.job_models import initial_decoder, load_teacher
from orchestrator.training.loop import Diverged, Hooks, Position, TrainingSetup, train
from orchestrator.training.objective import make_objective
from orchestrator.training.optimizer import make_optimizer
from orchestrator.training.retention import remove_partial_checkpoints
from orchestrator.training.schedules import flops_per_token_by_step, schedule_by_step
from orchestrator.training.teacher_cache import CachedTeacher
from orchestrator.training.throughput import ThroughputMeter
from orchestrator.training.validation import validation_loss
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import write_json
from orchestrator.workspace.journal import Journal

LOCK_NAME = "lock"
LOCK_SECONDS = 20.0
"""How long a job waits for another process in its folder."""

Report = Callable[[int, Mapping[str, float]], None]


def run_job(
    job: TrainingJob,
    *,
    world: World | None = None,
    should_stop: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> TrainingOutcome:
    """Train a job to its end, or until a stop is asked for. Call it on every worker.

    Args:
        job: What to train.
        world: This worker's place; a single worker on the CPU when unset.
        should_stop: Asked before each step, beside the job's stop file.
        report: Told the step and its numbers on the first worker, beside the journal.

    Raises:
        UserError: If the job cannot run as described, or its folder is in use or holds another job.
        Diverged: If the loss is no number any more; says at which step, and the last good
        checkpoint.
    """
    world = world or World()
    num_workers = world.size
    run_on_first(lambda: check_job(job, num_workers=num_workers), world)
    with _locked(job.folder, world):
        outcome = run_on_first(lambda: _open_folder(job), world)
        if outcome:
            return outcome
        with closing(_Run(job, world, report)) as run:
            run.prepare(run_on_first(run.newest_checkpoint, world))
            try:
                finished = train(run.trainee(), run.position, run.hooks(should_stop))
                run_on_first(run.saver.finish, world)
            except Diverged as error:
                raise run.with_last_checkpoint(error) from None
            return run.end(finished)


def _open_folder(job: TrainingJob) -> TrainingOutcome | None:
    write_job_file(job)
    remove_partial_checkpoints(job.folder)
    return finished_outcome(job)


class _Run:
    """One run in progress: the loop's hooks, and what they need."""

    def __init__(self, job: TrainingJob, world: World, report: Report | None) -> None:
        self.job, self.world = job, world
        self.config = job.config()
        self.store = open_tokens(job.tokens_folder)
        self.journal = Journal(job.folder) if world.is_first else None
        self._report = report
        self.schedule_at = schedule_by_step(self.config.corrections, job.recipe)
        self.plan = BatchPlan(len(self.store.train), self.config.context_length, job.recipe.seed)
        self.global_batch = sequences_per_step(job.recipe, self.config)
        self.teacher = load_teacher(job, world)
        self.saver = CheckpointWriter(job, world, self.store, self.event)
        self.position = Position()
        self._flops = flops_per_token_by_step(job, self.teacher)

    def close(self) -> None:
        """Let the last checkpoint be written, and close the journal."""
        self.saver.close()
        if self.journal:
            self.journal.close()

    def trainee(self) -> TrainingSetup:
        """Return what is trained, and how."""
        has_idle_parameters = self.decoder.method.has_corrections
        return TrainingSetup(
            model=replicate(self.decoder, self.world, has_idle_parameters=has_idle_parameters),
            optimizer=self.optimizer,
            objective=make_objective(self.job, self.schedule_at, self.teacher),
            recipe=self.job.recipe,
            world=self.world,
        )

    def hooks(self, should_stop: Callable[[], bool] | None) -> Hooks:
        """Return what the loop calls; `should_stop` is asked beside the job's stop file."""
        folder, is_first = self.job.folder, self.world.is_first
        asked = should_stop or (lambda: False)
        return Hooks(
            batch=self.batch,
            flops_per_token=self._flops,
            validate=self.validate,
            report=self.report,
            event=self.event,
            throughput=ThroughputMeter(
                self.position, self.world, self.job.recipe.precision
            ).measure,
            save=self.save,
            should_stop=lambda: is_first and (is_stop_requested(folder) or asked()),
            should_save=lambda: is_first and self.saver.is_due(self.position.step),
        )

    def end(self, finished: bool) -> TrainingOutcome:
        """Write down what the run has come to, and return it."""
        outcome = self.outcome(finished)
        if self.journal:
            if finished:
                write_json(self.job.folder / DONE_NAME, outcome.to_dict())
            self.journal.event("finished" if finished else "stopped", step=outcome.step)
        return outcome

    def batch(self, step: int) -> Batch:
        """Return this worker's part of a step."""
        return self.plan.batch(
            step,
            self.store.train,
            global_batch=self.global_batch,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def validate(self, step: int) -> float:
        """Return the validation loss under the schedule in training."""
        recipe, world = self.job.recipe, self.world
        batches = validation_batches(
            self.store.validation,
            context_length=self.config.context_length,
            num_tokens=recipe.num_validation_tokens,
            batch_size=recipe.num_sequences_per_pass or self.global_batch // world.size,
        )
        return validation_loss(
            self.decoder,
            list(batches),
            self.schedule_at(step - 1),
            precision=recipe.precision,
            world=world,
        )

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write numbers into the journal."""
        if self.journal:
            self.journal.metrics(step, numbers)
            if self._report:
                self._report(step, numbers)

    def event(self, name: str, **details: Any) -> None:
        """Write into the journal that something happened."""
        if self.journal:
            self.journal.event(name, **details)

    def save(self, position: Position) -> None:
        """Begin to write a checkpoint."""
        self.saver.save(position, self.decoder, self.optimizer)

    def outcome(self, finished: bool) -> TrainingOutcome:
        """Return what the run has come to."""
        return TrainingOutcome(
            checkpoint=str(self.saver.checkpoint) if self.saver.checkpoint else None,
            step=self.position.step,
            finished=finished,
            validation_loss=self.position.validation_loss,
            train_seconds=self.position.seconds,
            num_tokens=self.position.num_tokens,
            training_flops=self.position.flops,
            shared_flops=self.position.shared_flops,
        )

    def prepare(self, checkpoint: Path | None) -> None:
        """Make decoder and optimizer, fresh or as the checkpoint left them."""
        recipe, world = self.job.recipe, self.world
        decoder = initial_decoder(self.job, self.config)
        if checkpoint:
            decoder.load_state_dict(load_decoder(checkpoint, check=False).state_dict())
        self.decoder = decoder.to(world.device).train()
        self.decoder.activation_checkpointing = recipe.activation_checkpointing
        if recipe.compile:
            compile_fields(self.decoder)
        if world.is_sharded:
            from orchestrator.training.sharding import shard

            shard(self.decoder, world, precision=recipe.precision)
        self.optimizer = make_optimizer(self.decoder, recipe)
        if checkpoint is None:
            self.event("started", **self._place())
            return
        state = load_training_state(checkpoint)
        moments = state["optimizer"]
        if world.is_sharded:
            from orchestrator.training.sharding import sharded_state

            moments = sharded_state(moments, self.optimizer)
        self.optimizer.load_state_dict(moments)
        self.position = Position(**state["position"])
        if checkpoint.parent != self.job.folder:
            self.position.shared_flops = self.position.flops
        self.saver.go_on_from(checkpoint, self.position.step)
        set_random_state(state["random"], world)
        self.event("resumed", step=self.position.step, path=str(checkpoint), **self._place())

    def _place(self) -> dict[str, Any]:
        return {
            "num_workers": self.world.size,
            "parallel": self.world.parallel,
            "device": self.world.device,
            "num_threads": torch.get_num_threads(),
            "reads_teacher": isinstance(self.teacher, CachedTeacher),
            "pid": os.getpid(),
        }

    def newest_checkpoint(self) -> Path | None:
        """Return the checkpoint that the run continues from, if any."""

        def warn(sentence: str) -> None:
            self.event("damaged", text=sentence)

        own = newest_checkpoint(self.job.folder, warn) or self.saver.fetch()
        stage = self.saver.first_stage
        common = stage.find(warn) if stage and stage.is_ahead_of(own) else None
        if not (stage and common):
            return own
        for step, numbers in stage.record():
            self.report(step, numbers)
        return common

    def with_last_checkpoint(self, error: Diverged) -> Diverged:
        """Return the error with the last good checkpoint and advice in its text."""
        with suppress(RunFailed):  # One reason to end is enough.
            self.saver.finish()
        self.event("diverged", step=self.position.step, text=str(error))
        last = f"the last good checkpoint is {self.saver.checkpoint or 'none'}"
        section = self.job.section
        # Models from scratch may have a rate of their own, students have not.
        own = " (or its own in sweep.learning_rates)" if section == "training" else ""
        return Diverged(
            f"{error}; {last}; lower {section}.learning_rate={self.job.recipe.learning_rate:g}"
            f"{own}, lengthen {section}.warmup_steps, or raise {section}.skip_bad_steps"
        )


@contextmanager
def _locked(folder: Path, world: World) -> Iterator[None]:
    lock = FileLock(folder / LOCK_NAME)

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise UserError(
                f"another process trains in {folder}; wait for it, stop it, or choose another name"
            ) from None

    run_on_first(acquire, world)
    try:
        yield
    finally:
        if world.is_first:
            lock.release()
