"""Run a training job in this process; read this file from top to bottom.

`run_job` is idempotent: a finished job returns at once; an unfinished one resumes from its newest
intact checkpoint, with the same result as without interruption. All state is in the model, the
optimizer and a `Position`, so a run that saves and loads these three resumes bit for bit. The first
worker looks for files and tells the others; in a sharded model each worker reads and writes its own
rows. Nothing here knows Ray or MLflow.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from iiet.decoder import Decoder
from iiet.iiad.distillation import Model, RememberingTeacher
from iiet.model.batch import Batch
from orchestrator.data.mixture import open_data
from orchestrator.models.folder import check_checkpoint, newest_checkpoint
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.records.training_state import DIVERGED_EVENT
from orchestrator.terminal.stop import stop_requested
from orchestrator.training.checkpoint import (
    CheckpointWriter,
    Position,
    load_optimizer,
    load_training_state,
    set_random_state,
)
from orchestrator.training.continuing import metrics_until
from orchestrator.training.devices import (
    Replicas,
    autocast,
    check_precision,
    clear_gradients,
    clip_gradients,
    compile_a_field,
    compile_layers,
    decoder_to_train,
    free_gathered,
    load_teacher,
    mean_over_workers,
    pass_of_several,
    run_on_first,
)
from orchestrator.training.job import (
    check_job,
    finished_outcome,
    sequences_per_step,
    write_job_file,
)
from orchestrator.training.monitor import StepProfiler, ThroughputMeter
from orchestrator.training.objective import (
    Objective,
    losses_of,
    make_objective,
    make_optimizer,
    mean_by_component,
    output_sizes,
    set_learning_rate,
    validation_metrics,
)
from orchestrator.training.schedules import (
    cheaper_by_step,
    drawn_by_step,
    flops_per_token_by_step,
    largest_step,
    learning_rate_at,
    schedule_by_step,
)
from orchestrator.training.world import World
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.files import delete_leftovers
from orchestrator.workspace.journal import CHEAPEST_METRIC, VALIDATION_METRIC, Journal
from orchestrator.workspace.layout import DONE_NAME, WORKERS_LOCK_NAME
from orchestrator.workspace.locks import lock_file

LOCK_SECONDS = 180.0
"""Longest wait for the lock of an earlier worker; NFS keeps a lost node's lock for 90 seconds."""
RECORD_EVERY_STEPS = 10
"""Steps between two records of training losses, which are means since the last record."""
RECORD_EVERY_SECONDS = 15.0
"""Longest time between two records: a step of a large model may take a minute."""
NUM_RECORDED_POINTS = 250
"""Fewest records of a run, if it has that many steps."""
SPIKE_WINDOW = 64
"""Steps whose median gradient norm defines a spike; checks start after a quarter of them."""
STEPS_BETWEEN_COLLECTIONS = 50
"""Steps between garbage collections, which all workers make in the same step."""

ReportMetrics = Callable[[int, Mapping[str, float]], None]


class Diverged(RunFailed):
    """The loss or the gradient is not finite, or spiked; a retry would end the same way."""


def run_job(
    job: TrainingJob,
    *,
    world: World | None = None,
    should_stop: Callable[[], bool] = stop_requested,
    should_save: Callable[[], bool] | None = None,
    report: ReportMetrics | None = None,
    sequences_if_uncompiled: int | None = None,
) -> TrainingOutcome:
    """Train a job to its end, or until a stop is requested. Call it on every worker.

    Args:
        job: What to train.
        world: This worker's rank and device; a single worker on the CPU when unset.
        should_stop: Called after each step on the first worker, and before the first step.
        should_save: Called likewise; True if workers may soon be lost, which writes a checkpoint at
            once.
        report: Called with (steps done, metrics) on the first worker, in addition to the journal.
        sequences_if_uncompiled: Sequences of a micro-batch that fit the memory if the compiler
            fails; None for as many as the recipe says.

    Raises:
        UserError: If the job cannot run, or its folder holds another job.
        RunFailed: If another process keeps training in its folder.
        Diverged: If the loss is not finite or spikes; names the step and the last good checkpoint.
    """
    world = world or World()
    # Replicas may have unequal shares of a step; shards must make the same number of passes.
    num_workers = world.size if world.is_sharded else 1
    with ExitStack() as stack:

        def open_folder() -> TrainingOutcome | None:
            check_job(job, num_workers=num_workers)
            # Workers outlive a killed driver by seconds, and a lost node's lock outlives the node.
            # Two commands never get here with one folder: the second waits for the run's lock
            # (`run_locks.py`).
            lock = lock_file(job.folder / WORKERS_LOCK_NAME, seconds=LOCK_SECONDS)
            if not stack.enter_context(lock):
                raise RunFailed(
                    f"another process trained in {job.folder} for {LOCK_SECONDS:g} s; wait for it, "
                    "stop it, or choose another name"
                )
            write_job_file(job)
            delete_leftovers(job.folder)
            return finished_outcome(job)

        if outcome := run_on_first(open_folder, world):
            return outcome
        check_precision(job.recipe.precision, world.device, section=job.section)
        trainer = stack.enter_context(
            closing(Trainer(job, world, should_stop, should_save, report, sequences_if_uncompiled))
        )
        trainer.prepare()
        trainer.try_largest_step()
        try:
            finished = trainer.train()
            trainer.writer.end()
        except Diverged as error:
            raise run_on_first(partial(trainer.with_advice, error), world) from None
        return trainer.end(finished)


class Trainer:
    """One training in progress, on one of its workers."""

    model: nn.Module
    """The decoder to call; with several workers it is replicated or sharded."""
    decoder: Decoder
    optimizer: torch.optim.Optimizer
    objective: Objective
    frozen_teacher: Decoder | None
    """The model that the job learns from."""
    teacher: Model | None
    """What a student, and the cheaper schedules of elastic training, learn from: the frozen
    teacher, or its remembered predictions."""

    def __init__(
        self,
        job: TrainingJob,
        world: World,
        should_stop: Callable[[], bool],
        should_save: Callable[[], bool] | None,
        report: ReportMetrics | None,
        sequences_if_uncompiled: int | None,
    ) -> None:
        """Open the job's data, journal and teacher; arguments as of `run_job`."""
        self.job = job
        self.recipe = job.recipe
        self.distillation = job.teaching
        self.world = world
        self.position = Position()
        self.data = open_data(job.tokens_folder)
        self.journal = Journal(job.folder) if world.is_first else None
        self.frozen_teacher = load_teacher(job, world)
        self.teacher = self.frozen_teacher
        if self.frozen_teacher and job.recipe.elastic:
            # All schedules of a step share one forward pass of the teacher.
            self.teacher = RememberingTeacher(self.frozen_teacher)
        self.drawn_at = drawn_by_step(job.model.corrections, job.recipe)
        self.cheaper_at = cheaper_by_step(job.model.corrections, job.recipe)
        self.writer = CheckpointWriter(job, world, self.data, self.event)
        self.schedule_at = schedule_by_step(job.model.corrections, job.recipe)
        teacher_config = self.frozen_teacher.config if self.frozen_teacher else None
        self.flops_per_token = flops_per_token_by_step(job, teacher_config)
        self._should_stop = should_stop
        self._should_save = should_save
        self._report = report
        self.sequences_per_pass = job.recipe.num_sequences_per_pass
        self._sequences_if_uncompiled = sequences_if_uncompiled
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[Batch]] = {}
        self.profiler: StepProfiler | None = None
        if job.recipe.profile_steps and world.is_first:
            steps = job.recipe.profile_steps
            self.profiler = StepProfiler(job.folder, steps, world.device, self.event)

    def close(self) -> None:
        """End the threads, and close the journal."""
        self._pool.shutdown(cancel_futures=True)
        for part in (self.profiler, self.writer, self.journal):
            if part:
                part.close()

    def prepare(self) -> None:
        """Make model, optimizer and losses, and load the newest checkpoint if there is one."""
        job = self.job
        recipe = self.recipe
        world = self.world
        checkpoint = run_on_first(self._find_start, world)
        self.decoder = decoder_to_train(job, world, checkpoint)
        self.decoder.activation_checkpointing = recipe.activation_checkpointing
        compiles = world.is_gpu if recipe.compile is None else recipe.compile
        if compiles:
            self._compile()
        self.optimizer = make_optimizer(self.decoder, recipe)
        hardware = {
            "num_workers": world.size,
            "parallel": world.parallel,
            "num_shards": world.num_shards,
            "device": world.device,
            "processor": world.processor,
            "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "num_threads": torch.get_num_threads(),
            "pid": os.getpid(),
        }
        if checkpoint is None:
            self.event("started", **hardware)
        else:
            state = load_training_state(checkpoint)
            load_optimizer(self.optimizer, self.decoder, checkpoint, state["optimizer"])
            self.position = Position(**state["position"])
            if checkpoint.parent != job.folder:
                self.position.shared_flops = self.position.flops
            self.writer.resume_from(checkpoint, self.position.step)
            set_random_state(state["random"], world)
            self.event("resumed", step=self.position.step, path=str(checkpoint), **hardware)

        self.objective = make_objective(
            self.schedule_at, self.teacher, self.distillation, self.data.component_names
        )
        self.replicas = Replicas(self.decoder, world)
        self.meter = ThroughputMeter(self.position, world, recipe.precision)

    def _compile(self) -> None:
        """Compile the layers; if that fails, reduce the micro-batch to what fits uncompiled."""
        compilation = compile_layers(self.decoder, self.event)
        if self.world.is_sharded:
            return
        most = -(-sequences_per_step(self.recipe, self.job.model) // self.world.size)
        num_sequences = min(self.sequences_per_pass or most, most)
        compile_a_field(
            self.decoder,
            compilation,
            self.world,
            precision=self.recipe.precision,
            num_sequences=num_sequences,
            num_tokens=self.job.sequence_length,
        )
        fewer = self._sequences_if_uncompiled
        if compilation.has_failed and fewer is not None and fewer < num_sequences:
            self.sequences_per_pass = fewer
            text = f"without the compiler, {fewer} sequences of a pass fit {self.world.device}"
            self.event("smaller passes", text=f"{text}, so a step has more passes (same gradients)")

    def _find_start(self) -> Path | None:
        """Return the checkpoint to start from, if there is one.

        It is the run's own, one from its storage, or that of the continued run, whose metrics are
        then recorded as this run's.
        """

        def warn(text: str) -> None:
            self.event("damaged", text=text)

        of_run = newest_checkpoint(self.job.folder, warn, with_training_state=True)
        if of_run is None and self.writer.remote:
            of_run = self.writer.remote.download(warn)
        if of_run is not None or self.job.continued_from is None:
            return of_run
        start = Path(self.job.continued_from)
        check_checkpoint(start, with_training_state=True)
        for step, numbers in metrics_until(start):
            self.report(step, numbers)
        return start

    def train(self) -> bool:
        """Train from the current position to the recipe's last step.

        A step ends with one reduction over the workers, so that the host waits for the device once.
        In it they agree on the step's losses, the sizes of the next batch, and whether to record,
        stop and save.

        Returns:
            True after the last step, False after an earlier stop. The state is saved in both cases.

        Raises:
            Diverged: If loss or gradient are bad (not finite, or a spike) in more consecutive steps
                than the recipe skips; the weights are those before the step.
        """
        recipe = self.recipe
        world = self.world
        position = self.position
        if position.step == recipe.num_steps:
            return True
        record_every = max(1, min(RECORD_EVERY_STEPS, recipe.num_steps // NUM_RECORDED_POINTS))
        recorded_at = time.monotonic()
        batch = self.batch(position.step)
        agreed = mean_over_workers({**_counts(batch), **self.requests(position.step)}, world)
        with _rare_garbage_collections() as collect_garbage:
            while True:
                if agreed["stop"] or agreed["save"]:
                    self.writer.save(position, self.decoder, self.optimizer)
                if agreed["stop"]:
                    return False

                # Forward and backward. The device works while the next batch is fetched.
                started = time.perf_counter()
                batch = batch.counted_as(agreed["targets"], agreed["positions"])
                batch = batch.to(world.device, non_blocking=True)
                learning_rate = learning_rate_at(position.step, recipe)
                set_learning_rate(self.optimizer, learning_rate)
                num_tokens = round(agreed["tokens"] * world.size)
                totals = self.compute_gradients(batch, position.step)
                step = position.step + 1
                is_last = step == recipe.num_steps
                validates = is_last or step % recipe.validate_every_steps == 0
                to_agree: dict[str, float | Tensor] = {**totals}
                if not is_last:
                    batch = self.batch(step)
                    to_agree |= _counts(batch)
                if not validates:
                    to_agree |= self.requests(step)
                # All workers record in the same step, because they exchange the loads of their
                # GPUs.
                is_late = time.monotonic() - recorded_at >= RECORD_EVERY_SECONDS
                to_agree["late"] = float(is_late)
                agreed = mean_over_workers(to_agree, world)

                # The update, if loss and gradient are good.
                sums = {name: agreed[name] for name in totals}
                numbers = mean_by_component(sums)
                numbers["learning_rate"] = learning_rate
                if self._accept_step(numbers):
                    self.optimizer.step()
                    position.add_to_window(sums)
                clear_gradients(self.model, self.optimizer)
                position.num_tokens += num_tokens
                position.flops += num_tokens * self.flops_per_token(position.step)
                position.seconds += time.perf_counter() - started
                position.step = step

                # Records, validation and checkpoints.
                if position.num_skipped_in_row:
                    self.event("skipped", step=step, **numbers)
                    self.report(step, {"train/skipped_steps": position.num_skipped})
                elif is_last or step % record_every == 0 or agreed["late"]:
                    recorded_at = time.monotonic()
                    means = mean_by_component(position.end_window())
                    means["learning_rate"] = learning_rate
                    means |= {"tokens": position.num_tokens, "flops": position.flops}
                    metrics = {f"train/{name}": number for name, number in means.items()}
                    self.report(step, metrics | self.meter.measure(position))
                if validates:
                    metrics = self.validate()
                    position.validation_loss = metrics[VALIDATION_METRIC]
                    self.report(step, metrics)
                if is_last or step % recipe.checkpoint_every_steps == 0:
                    self.writer.save(position, self.decoder, self.optimizer)
                if self.profiler:
                    self.profiler.end_step()
                if is_last:
                    return True
                if validates:  # After it, because its result may be a reason to stop.
                    agreed |= mean_over_workers(self.requests(step), world)
                if step % STEPS_BETWEEN_COLLECTIONS == 0:
                    collect_garbage()

    def try_largest_step(self) -> None:
        """Run the largest remaining step, if it is not the next one, without changing any state.

        Corrections may begin after days. If their step does not fit into memory, or cannot be
        compiled, the training then ends in its first minute. Weights, moments and random states
        stay as they are.
        """
        world = self.world
        next_step = self.position.step
        if next_step == self.recipe.num_steps:
            return
        step = largest_step(self.job, self.flops_per_token, next_step)
        if step == next_step:
            return
        batch = self._gather(next_step)
        agreed = mean_over_workers(_counts(batch), world)
        batch = batch.counted_as(agreed["targets"], agreed["positions"]).to(world.device)
        with torch.random.fork_rng([world.device] if world.is_gpu else []):
            self.compute_gradients(batch, step)
        if not self.optimizer.state:
            # A first update allocates the moments; with zero gradients and rate it changes no
            # weight.
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            set_learning_rate(self.optimizer, 0.0)
            self.optimizer.step()
            self.optimizer.state.clear()
        clear_gradients(self.model, self.optimizer)

    def compute_gradients(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Run a step forward and backward; return loss, its parts and the norm of the gradient.

        Micro-batches save memory. Their losses are divided by the targets of the whole batch, so
        the gradients equal those of a single pass up to rounding.
        """
        schedules = (self.schedule_at(step), *self.cheaper_at(step))
        self.model = self.replicas.model_for(schedules)
        parts_of_batch = batch.split(self.sequences_per_pass or len(batch))
        cheaper = self.drawn_at(step)
        num_passes = len(parts_of_batch) * (1 + len(cheaper))
        passes_left = num_passes
        totals: dict[str, Any] = {}  # Added up on the device, without waiting for it.
        for part in parts_of_batch:
            share = len(part) / len(batch)
            losses = losses_of(
                self.objective,
                self.model,
                part,
                step,
                cheaper=cheaper,
                elastic=self.recipe.elastic,
                # In a retrofit, cheaper schedules learn from the full one, not from the source
                # model.
                teacher=None if self.recipe.source_kl_weight else self.teacher,
                distillation=self.distillation,
            )
            for _ in range(1 + len(cheaper)):
                passes_left -= 1
                context: AbstractContextManager[None] = nullcontext()
                if num_passes > 1:
                    context = pass_of_several(self.model, self.world, is_last=passes_left == 0)
                with context:
                    with autocast(self.recipe.precision, self.world):
                        loss, terms = next(losses)
                    torch.autograd.backward(loss * share)
                for name, value in {"loss": loss, **terms}.items():
                    totals[name] = totals.get(name, 0.0) + share * value.detach().double()
        free_gathered(self.frozen_teacher)
        return {**totals, "gradient_norm": clip_gradients(self.model, self.recipe.clip_norm)}

    def _accept_step(self, numbers: Mapping[str, float]) -> bool:
        """Return whether the weights are updated; if not, count the step as skipped.

        Raises:
            Diverged: If the recipe allows no further skipped step.
        """
        recipe = self.recipe
        position = self.position
        loss = numbers["loss"]
        norm = numbers["gradient_norm"]
        norms = position.recent_norms
        problem = ""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            problem = "diverged"
        elif recipe.spike_factor and len(norms) >= SPIKE_WINDOW // 4:
            times = norm / median(norms)
            if times > recipe.spike_factor:
                problem = f"spiked (its gradient has {times:.1f} times the usual norm)"
        if not problem:
            position.num_skipped_in_row = 0
            if recipe.spike_factor:
                position.recent_norms = [*norms, norm][-SPIKE_WINDOW:]
            return True
        skipped = position.num_skipped_in_row
        if skipped >= recipe.skip_bad_steps:
            raise Diverged(
                f"training {problem} at step {position.step + 1}: loss {loss:g}, gradient norm "
                f"{norm:g}, learning rate {numbers['learning_rate']:g}"
                + (f", after {skipped} skipped in a row" if skipped else "")
            )
        position.num_skipped += 1
        position.num_skipped_in_row += 1
        return False

    def end(self, finished: bool) -> TrainingOutcome:
        """Record how the run ended, and return that."""
        checkpoint = self.writer.checkpoint
        position = self.position
        outcome = TrainingOutcome(
            checkpoint=str(checkpoint) if checkpoint else None,
            step=position.step,
            finished=finished,
            validation_loss=position.validation_loss,
            train_seconds=position.seconds,
            num_tokens=position.num_tokens,
            training_flops=position.flops,
            shared_flops=position.shared_flops,
        )
        if finished and self.world.is_first:
            outcome.write(self.job.folder / DONE_NAME)
        self.event("finished" if finished else "stopped", step=outcome.step)
        return outcome

    def with_advice(self, error: Diverged) -> Diverged:
        """Record a divergence; return it with the last good checkpoint and what to change."""
        with suppress(RunFailed):  # Report the divergence, not a failure to save.
            self.writer.wait()
        self.event(DIVERGED_EVENT, step=self.position.step, text=str(error))
        section = self.job.section
        # In a sweep, a model from random weights may have its own rate.
        or_own_rate = ", or its own in sweep.learning_rates" if section == "training" else ""
        return Diverged(
            f"{error}; the last good checkpoint is {self.writer.checkpoint or 'none'}; lower "
            f"{section}.learning_rate (here {self.recipe.learning_rate:g}{or_own_rate}), lengthen "
            f"{section}.warmup_steps, or raise {section}.skip_bad_steps"
        )

    # Inputs and outputs of the loop, which a test replaces to need no files.

    def batch(self, step: int) -> Batch:
        """Return a step's batch, on the CPU, and gather the next one in a thread.

        So a step does not wait for the disk. A batch depends on its step alone, also in a resumed
        run. An error of the thread is raised in the step that needs the batch.
        """
        ahead = self._ahead.pop(step, None)
        batch = ahead.result() if ahead else self._gather(step)
        if step + 1 < self.recipe.num_steps:
            self._ahead = {step + 1: self._pool.submit(self._gather, step + 1)}
        return batch

    def _gather(self, step: int) -> Batch:
        job = self.job
        world = self.world
        batch = self.data.batch(
            step,
            context_length=job.sequence_length,
            seed=job.recipe.seed,
            global_batch=sequences_per_step(job.recipe, job.model),
            rank=world.rank,
            world_size=world.size,
        )
        return (
            batch.pinned() if world.is_gpu else batch
        )  # A GPU reads pinned memory asynchronously.

    def requests(self, step: int) -> dict[str, float]:
        """Return whether the first worker wants to stop or save after a step; call it once per
        step."""
        stops = False
        saves = False
        if self.world.is_first:
            may_be_lost = self._should_save is not None and self._should_save()
            saves = may_be_lost or self.writer.is_due(step)
            stops = self._should_stop()
        return {"stop": float(stops), "save": float(saves)}

    def validate(self) -> dict[str, float]:
        """Return the validation metrics, the same on all workers.

        They are those under the schedule of the latest step, and the sizes of the fields' outputs;
        in elastic training also the loss under the cheapest schedule.
        """
        job = self.job
        recipe = self.recipe
        last_step = self.position.step - 1
        sequences_per_worker = sequences_per_step(recipe, job.model) // self.world.size
        batches = list(
            self.data.validation_batches(
                context_length=job.sequence_length,
                num_tokens=recipe.num_validation_tokens,
                batch_size=recipe.num_sequences_per_pass or sequences_per_worker,
            )
        )
        metrics_of = partial(
            validation_metrics,
            self.decoder,
            batches,
            precision=recipe.precision,
            world=self.world,
            component_names=self.data.component_names,
        )
        schedule = self.schedule_at(last_step)
        metrics = metrics_of(schedule)
        # One sequence, whatever the batch size, so that sizes of two runs can be compared.
        metrics |= output_sizes(
            self.decoder,
            batches[0].input_ids[:1],
            schedule,
            precision=recipe.precision,
            world=self.world,
        )
        if cheaper := self.cheaper_at(last_step):
            metrics[CHEAPEST_METRIC] = metrics_of(cheaper[-1])[VALIDATION_METRIC]
        return metrics

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the metrics of a step; only the first worker writes them."""
        if self.journal:
            self.journal.metrics(step, numbers)
            if self._report:
                self._report(step, numbers)

    def event(self, name: str, **details: Any) -> None:
        """Record an unusual event; only the first worker writes it."""
        if self.journal:
            self.journal.event(name, **details)


def _counts(batch: Batch) -> dict[str, float]:
    """Return the counts that a loss divides by; the loop averages them over the workers."""
    return {
        "targets": float(batch.num_targets),
        "positions": float(batch.num_positions),
        "tokens": float(batch.input_ids.numel()),
    }


@contextmanager
def _rare_garbage_collections() -> Iterator[Callable[[], object]]:
    """Collect garbage in a `with` block only when the yielded function is called.

    A worker that collects at its own time would keep all others waiting.
    """
    was_enabled = gc.isenabled()
    gc.collect(1)
    gc.freeze()
    gc.disable()
    try:
        yield partial(gc.collect, 1)
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
