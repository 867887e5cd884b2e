"""Compute what a teacher outputs for the training sequences of a job, and plan its storage."""

from __future__ import annotations

from pathlib import Path

import torch

from iiet.distillation import CoarseDistribution, DistillationConfig, coarsen
from orchestrator.data.batches import BatchPlan
from orchestrator.data.token_store import open_tokens
from orchestrator.training.checkpoint import load_config, load_decoder, weights_key
from orchestrator.training.distributed import World, autocast
from orchestrator.training.job import TrainingJob, sequences_per_step
from orchestrator.training.teacher_cache import Answer, Answers, CachePlan


def cache_plan(job: TrainingJob) -> CachePlan | None:
    """Return what a cache for a job would hold; None if its teacher has nothing that can be stored.

    Raises:
        UserError: If tokens or teacher are missing, or the batch is no whole number of sequences.
    """
    loss = job.distillation or DistillationConfig()
    num_steps = len(teaching_steps(job))
    if job.objective != "distill" or not job.teacher_folder or loss.hidden_weight or not num_steps:
        return None
    config, recipe = job.config(), job.recipe
    teacher = load_config(Path(job.teacher_folder))
    return CachePlan(
        origin={
            "teacher": weights_key(Path(job.teacher_folder)),
            "model": teacher.to_dict(),
            "tokens": open_tokens(job.tokens_folder).fingerprint,
            "seed": recipe.seed,
            "first_step": teaching_steps(job)[0],
            # The last bits of a row can depend on how many rows are computed together.
            "sequences_per_pass": recipe.num_sequences_per_pass,
        },
        num_steps=num_steps,
        num_sequences=sequences_per_step(recipe, config),
        context_length=config.context_length,
        vocab_size=teacher.vocab_size,
        precision=recipe.precision,
        top_k=loss.top_k,
        temperature=loss.temperature if loss.top_k else 1.0,
    )


def teacher_answers(job: TrainingJob, *, device: str = "cpu") -> Answers:
    """Return what the teacher of a job says, computed as the job itself would, step by step.

    Args:
        job: One that distills.
        device: Where the teacher runs.
    """
    assert job.teacher_folder
    teacher = load_decoder(Path(job.teacher_folder), device=device, frozen=True)
    store, config = open_tokens(job.tokens_folder), job.config()
    plan = BatchPlan(len(store.train), config.context_length, job.recipe.seed)
    global_batch = sequences_per_step(job.recipe, config)
    loss, steps = job.distillation or DistillationConfig(), teaching_steps(job)
    world = World(device=device)

    @torch.no_grad()
    def answers(number: int) -> tuple[torch.Tensor, Answer]:
        batch = plan.batch(steps[number], store.train, global_batch=global_batch)
        sequences = batch.input_ids
        passes = torch.split(sequences, job.recipe.num_sequences_per_pass or len(sequences))
        exact: list[torch.Tensor] = []
        coarse: list[CoarseDistribution] = []
        for part in passes:
            with autocast(job.recipe.precision, world):
                logits = teacher(part.to(device))
                # The device holds the logits of one pass, as it does while a student learns.
                if loss.top_k is None:
                    exact.append(logits.cpu())
                else:
                    coarse.append(coarsen(logits, loss.top_k, temperature=loss.temperature))
        return sequences, torch.cat(exact) if exact else CoarseDistribution.joined(coarse)

    return answers


def teaching_steps(job: TrainingJob) -> list[int]:
    loss = job.distillation or DistillationConfig()
    return [step for step in range(job.recipe.num_steps) if loss.uses_teacher(step)]
