"""Run a training job in this process.

`run_job` is idempotent: a finished job returns at once; an unfinished one resumes from its newest
intact checkpoint, with the same result as without interruption. Only the first worker accesses
files, and sends what it finds to the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from iiet.batch import Batch
from iiet.distillation import Model, RememberingTeacher
from iiet.schedule import IterationSchedule
from orchestrator.data.mixture import open_data
from orchestrator.models.folder import check_checkpoint, newest_checkpoint
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.terminal.stop import stop_requested
from orchestrator.training.checkpoint import load_training_state
from orchestrator.training.checkpoint_writer import CheckpointWriter, set_random_state
from orchestrator.training.compiling import compile_fields
from orchestrator.training.distributed import World, replicate, run_on_first
from orchestrator.training.first_stage import metrics_until
from orchestrator.training.job import finished_outcome, sequences_per_step
from orchestrator.training.job_checks import check_job, write_job_file
from orchestrator.training.job_models import decoder_to_train, load_teacher
from orchestrator.training.loop import Diverged, Hooks, Position, TrainingSetup, train
from orchestrator.training.objective import Passes, elastic_passes, make_objective, single_pass
from orchestrator.training.optimizer import make_optimizer
from orchestrator.training.precision import check_precision
from orchestrator.training.prefetching import BatchPrefetcher
from orchestrator.training.profiling import StepProfiler
from orchestrator.training.schedules import (
    drawn_by_step,
    flops_per_token_by_step,
    members_by_step,
    schedule_by_step,
)
from orchestrator.training.teacher_cache import CachedTeacher
from orchestrator.training.throughput import ThroughputMeter
from orchestrator.training.validation import validation_metrics
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.files import delete_leftovers
from orchestrator.workspace.journal import CHEAPEST_METRIC, VALIDATION_METRIC, Journal
from orchestrator.workspace.layout import DONE_NAME, WORKERS_LOCK_NAME
from orchestrator.workspace.locks import lock_file

DIVERGED_EVENT = "diverged"
"""Event in the journal, with the reason as `text`."""
LOCK_SECONDS = 180.0
"""Longest wait for the lock of an earlier worker; NFS keeps that of a lost node for 90 seconds."""

Report = Callable[[int, Mapping[str, float]], None]


def run_job(
    job: TrainingJob,
    *,
    world: World | None = None,
    should_stop: Callable[[], bool] = stop_requested,
    should_save: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> TrainingOutcome:
    """Train a job to its end, or until a stop is requested. Call it on every worker.

    Args:
        job: What to train.
        world: This worker's place; a single worker on the CPU when unset.
        should_stop: Called before each step on the first worker.
        should_save: Called before each step on the first worker, in addition to the recipe; True
            if the workers may soon be lost.
        report: Called with (steps done, metrics) on the first worker, in addition to the journal.

    Raises:
        UserError: If the job cannot run, or its folder holds another job.
        RunFailed: If another process keeps training in its folder.
        Diverged: If the loss is not finite or spikes; names the step and the last good checkpoint.
    """
    world = world or World()
    # Replicas may have unequal shares of a step. Shards make the same number of passes.
    num_workers = world.size if world.is_sharded else 1
    run_on_first(lambda: check_job(job, num_workers=num_workers), world)
    with _locked(job.folder, world):
        outcome = run_on_first(lambda: _open_folder(job), world)
        if outcome:
            return outcome
        check_precision(job.recipe.precision, world.device, section=job.section)
        with closing(_Run(job, world, report)) as run:
            run.prepare(run_on_first(run.newest_checkpoint, world))
            try:
                hooks = run.hooks(should_stop, should_save or _never)
                finished = train(run.setup(), run.position, hooks)
                run_on_first(run.writer.finish, world)
            except Diverged as error:
                problem = partial(run.with_last_checkpoint, error)
                raise run_on_first(problem, world) from None
            return run.end(finished)


def _never() -> bool:
    return False


def _open_folder(job: TrainingJob) -> TrainingOutcome | None:
    write_job_file(job)
    delete_leftovers(job.folder)
    return finished_outcome(job)


class _Run:
    """A run in progress: the hooks of the loop, and the state that they need."""

    def __init__(self, job: TrainingJob, world: World, report: Report | None) -> None:
        self.job, self.world = job, world
        self.config = job.model
        self.data = open_data(job.tokens_folder)
        self.journal = Journal(job.folder) if world.is_first else None
        self._report = report
        self.schedule_at = schedule_by_step(self.config.corrections, job.recipe)
        self.members_at = members_by_step(self.config.corrections, job.recipe)
        self.global_batch = sequences_per_step(job.recipe, self.config)
        self.teacher = load_teacher(job, world)
        self.writer = CheckpointWriter(job, world, self.data, self.event)
        self.position = Position()
        self.batches = BatchPrefetcher(
            self.batch, num_steps=job.recipe.num_steps, pin=world.device.startswith("cuda")
        )
        self.profiler: StepProfiler | None = None
        if job.recipe.profile_steps and world.is_first:
            self.profiler = StepProfiler(
                job.folder, job.recipe.profile_steps, world.device, self.event
            )

    def close(self) -> None:
        if self.profiler:
            self.profiler.close()
        self.batches.close()
        self.writer.close()
        if self.journal:
            self.journal.close()

    def setup(self) -> TrainingSetup:
        has_idle_parameters = self.decoder.method.has_corrections
        recipe = self.job.recipe
        teacher: Model | None = self.teacher
        passes: Passes = single_pass
        if recipe.elastic:
            if teacher is not None:
                teacher = RememberingTeacher(teacher)
            drawn_at = drawn_by_step(self.config.corrections, recipe)
            passes = elastic_passes(drawn_at, recipe.elastic, teacher, self.job.distillation)
        return TrainingSetup(
            model=replicate(self.decoder, self.world, has_idle_parameters=has_idle_parameters),
            optimizer=self.optimizer,
            objective=make_objective(
                self.schedule_at, teacher, self.job.distillation, self.data.source_names
            ),
            passes=passes,
            recipe=recipe,
            world=self.world,
        )

    def hooks(self, should_stop: Callable[[], bool], should_save: Callable[[], bool]) -> Hooks:
        is_first = self.world.is_first
        return Hooks(
            batch=self.batches.batch,
            flops_per_token=flops_per_token_by_step(self.job, self.teacher),
            validate=self.validate,
            report=self.report,
            event=self.event,
            throughput=ThroughputMeter(
                self.position, self.world, self.job.recipe.precision
            ).measure,
            save=lambda position: self.writer.save(position, self.decoder, self.optimizer),
            should_stop=lambda: is_first and should_stop(),
            should_save=lambda: (
                is_first and (should_save() or self.writer.is_due(self.position.step))
            ),
            end_step=self.profiler.end_step if self.profiler else lambda: None,
        )

    def end(self, finished: bool) -> TrainingOutcome:
        outcome = TrainingOutcome(
            checkpoint=str(self.writer.checkpoint) if self.writer.checkpoint else None,
            step=self.position.step,
            finished=finished,
            validation_loss=self.position.validation_loss,
            train_seconds=self.position.seconds,
            num_tokens=self.position.num_tokens,
            training_flops=self.position.flops,
            shared_flops=self.position.shared_flops,
        )
        if self.journal:
            if finished:
                outcome.write(self.job.folder / DONE_NAME)
            self.journal.event("finished" if finished else "stopped", step=outcome.step)
        return outcome

    def batch(self, step: int) -> Batch:
        return self.data.batch(
            step,
            context_length=self.config.context_length,
            seed=self.job.recipe.seed,
            global_batch=self.global_batch,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def validate(self, step: int) -> dict[str, float]:
        # Under the schedule of the latest step, and of an elastic model also its cheapest one.
        recipe, world = self.job.recipe, self.world
        batches = list(
            self.data.validation_batches(
                context_length=self.config.context_length,
                num_tokens=recipe.num_validation_tokens,
                batch_size=recipe.num_sequences_per_pass or self.global_batch // world.size,
            )
        )

        def metrics_of(schedule: IterationSchedule) -> dict[str, float]:
            return validation_metrics(
                self.decoder,
                batches,
                schedule,
                precision=recipe.precision,
                world=world,
                source_names=self.data.source_names,
            )

        metrics = metrics_of(self.schedule_at(step - 1))
        if members := self.members_at(step - 1):
            metrics[CHEAPEST_METRIC] = metrics_of(members[-1])[VALIDATION_METRIC]
        return metrics

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.journal:
            self.journal.metrics(step, numbers)
            if self._report:
                self._report(step, numbers)

    def event(self, name: str, **details: Any) -> None:
        if self.journal:
            self.journal.event(name, **details)

    def prepare(self, checkpoint: Path | None) -> None:
        recipe, world = self.job.recipe, self.world
        self.decoder = decoder_to_train(self.job, world, checkpoint)
        self.decoder.activation_checkpointing = recipe.activation_checkpointing
        if self.decoder.device.type == "cuda" if recipe.compile is None else recipe.compile:
            compile_fields(self.decoder, self.event)
        self.optimizer = make_optimizer(self.decoder, recipe)
        if checkpoint is None:
            self.event("started", **self._hardware())
            return
        state = load_training_state(checkpoint, mapped=world.device != "cpu" or world.is_sharded)
        moments = state["optimizer"]
        if world.is_sharded:
            from orchestrator.training.sharding import sharded_state

            moments = sharded_state(moments, self.optimizer)
        self.optimizer.load_state_dict(moments)
        self.position = Position(**state["position"])
        if checkpoint.parent != self.job.folder:
            self.position.shared_flops = self.position.flops
        self.writer.resume_from(checkpoint, self.position.step)
        set_random_state(state["random"], world)
        self.event("resumed", step=self.position.step, path=str(checkpoint), **self._hardware())

    def _hardware(self) -> dict[str, Any]:
        return {
            "num_workers": self.world.size,
            "parallel": self.world.parallel,
            "num_shards": self.world.num_shards,
            "device": self.world.device,
            "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "num_threads": torch.get_num_threads(),
            "reads_teacher": isinstance(self.teacher, CachedTeacher),
            "pid": os.getpid(),
        }

    def newest_checkpoint(self) -> Path | None:
        def warn(text: str) -> None:
            self.event("damaged", text=text)

        own = newest_checkpoint(self.job.folder, warn, with_training_state=True)
        own = own or self.writer.download()
        newest, stage = own, self.writer.first_stage
        if own is None and self.job.continued_from:
            newest = Path(self.job.continued_from)
            check_checkpoint(newest, with_training_state=True)
        if stage and stage.saves_steps(newest):
            newest = stage.find(warn) or newest
        if newest and newest != own:
            for step, numbers in metrics_until(newest):
                self.report(step, numbers)
        return newest

    def with_last_checkpoint(self, error: Diverged) -> Diverged:
        with suppress(RunFailed):  # The divergence is the error to report.
            self.writer.finish()
        self.event(DIVERGED_EVENT, step=self.position.step, text=str(error))
        last = f"the last good checkpoint is {self.writer.checkpoint or 'none'}"
        section = self.job.section
        # Models from scratch, and vanilla ones that are distilled, may have a rate of their own.
        has_own = section == "training" or (self.job.teacher_folder and not self.job.initial_folder)
        own = " (or its own in sweep.learning_rates)" if has_own else ""
        return Diverged(
            f"{error}; {last}; lower {section}.learning_rate={self.job.recipe.learning_rate:g}"
            f"{own}, lengthen {section}.warmup_steps, or raise {section}.skip_bad_steps"
        )


@contextmanager
def _locked(folder: Path, world: World) -> Iterator[None]:
    # Workers outlive a killed driver by seconds, and the lock of a lost node outlives the node. Two
    # commands on one folder do not meet here: `run_lock.py` lets the second one wait.
    with ExitStack() as stack:

        def acquire() -> None:
            if not stack.enter_context(lock_file(folder / WORKERS_LOCK_NAME, seconds=LOCK_SECONDS)):
                raise RunFailed(
                    f"another process trained in {folder} for {LOCK_SECONDS:g} s; wait for it, "
                    "stop it, or choose another name"
                )

        run_on_first(acquire, world)
        yield
