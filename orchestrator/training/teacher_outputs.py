"""Compute a teacher's outputs for the training sequences of a job, and describe their cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from iiet.decoder import Decoder
from iiet.distillation import CoarseDistribution, DistillationConfig, coarsen
from orchestrator.data.batches import BatchPlan
from orchestrator.data.token_store import open_tokens
from orchestrator.training.checkpoint import load_config, load_decoder, weights_key
from orchestrator.training.distributed import World, autocast
from orchestrator.training.job import TrainingJob, sequences_per_step
from orchestrator.training.teacher_cache import CachePlan, OutputsByStep, TeacherOutput


def cache_plan(job: TrainingJob) -> CachePlan | None:
    """Return the content of a job's teacher cache; None if its teacher's outputs cannot be stored.

    Raises:
        UserError: If tokens or teacher are missing, or the batch is no whole number of sequences.
    """
    loss = job.distillation or DistillationConfig()
    steps = teaching_steps(job)
    if job.objective != "distill" or not job.teacher_folder or loss.hidden_weight or not steps:
        return None
    config, recipe = job.config(), job.recipe
    teacher = load_config(Path(job.teacher_folder))
    return CachePlan(
        origin={
            "teacher": weights_key(Path(job.teacher_folder)),
            "model": teacher.to_dict(),
            "tokens": open_tokens(job.tokens_folder).fingerprint,
            "seed": recipe.seed,
            "first_step": steps[0],
            # The last bits of a row can depend on how many rows are computed together.
            "sequences_per_pass": recipe.num_sequences_per_pass,
        },
        num_steps=len(steps),
        num_sequences=sequences_per_step(recipe, config),
        context_length=config.context_length,
        vocab_size=teacher.vocab_size,
        precision=recipe.precision,
        top_k=loss.top_k,
        temperature=loss.temperature if loss.top_k else 1.0,
    )


def teacher_outputs_by_step(job: TrainingJob, *, device: str = "cpu") -> OutputsByStep:
    """Return a function that computes the teacher's outputs of a step as the job itself would.

    The teacher is loaded at the first call.
    """
    store, config, recipe = open_tokens(job.tokens_folder), job.config(), job.recipe
    plan = BatchPlan(len(store.train), config.context_length, recipe.seed)
    global_batch = sequences_per_step(recipe, config)
    loss, steps = job.distillation or DistillationConfig(), teaching_steps(job)
    world = World(device=device)

    @cache
    def teacher() -> Decoder:
        return load_decoder(Path(str(job.teacher_folder)), device=device, frozen=True)

    @torch.no_grad()
    def outputs(number: int) -> tuple[torch.Tensor, TeacherOutput]:
        sequences = plan.batch(steps[number], store.train, global_batch=global_batch).input_ids
        exact: list[torch.Tensor] = []
        coarse: list[CoarseDistribution] = []
        for part in torch.split(sequences, recipe.num_sequences_per_pass or len(sequences)):
            with autocast(recipe.precision, world):
                logits = teacher()(part.to(device))
                # Keep the logits of one pass only on the device, as the job itself does.
                if loss.top_k is None:
                    exact.append(logits.cpu())
                else:
                    coarse.append(coarsen(logits, loss.top_k, temperature=loss.temperature))
        return sequences, torch.cat(exact) if exact else CoarseDistribution.joined(coarse)

    return outputs


def teaching_steps(job: TrainingJob) -> list[int]:
    """Return the steps whose loss needs the teacher."""
    loss = job.distillation or DistillationConfig()
    return [step for step in range(job.recipe.num_steps) if loss.uses_teacher(step)]
