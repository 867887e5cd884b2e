"""The traced pieces of code: a training step, a distillation step, a decoded token.

They run the project's own functions, from `orchestrator.training.loop.train` and
`iiet.generation.stream` downwards, within `device.pretended_gpu`.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_model.device import decoder_on_gpu
from benchmarks.gpu_model.fusion import fusing_backend
from benchmarks.gpu_model.trace import Trace
from iiet.batch import Batch
from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.generation import stream
from orchestrator.settings import TrainingSettings
from orchestrator.training.compiling import compile_fields
from orchestrator.training.distributed import World
from orchestrator.training.loop import Hooks, Position, TrainingSetup, train
from orchestrator.training.objective import make_objective
from orchestrator.training.optimizer import make_optimizer
from orchestrator.training.precision import frozen_dtype
from orchestrator.workspace.journal import VALIDATION_METRIC

GPU = "cuda:0"


def training_step(
    config: ModelConfig,
    *,
    num_sequences: int,
    num_passes: int = 1,
    teacher: ModelConfig | None = None,
    **settings: Any,
) -> Trace:
    """Trace the second step of a training, with the optimizer's moments in place.

    Args:
        config: The model that is trained.
        num_sequences: Sequences of a pass, each as long as the context.
        num_passes: Passes of the step.
        teacher: Distill from this model, which runs beside the student; None: pretraining.
        settings: Of the recipe, such as `precision`, `activation_checkpointing` and `compile`.
    """
    recipe = TrainingSettings(
        num_steps=2,
        num_tokens_per_step=num_passes * num_sequences * config.context_length,
        num_sequences_per_pass=num_sequences,
        iterate_from_fraction=0.0,
        **{"precision": "bf16", **settings},
    )
    trace = Trace()
    with trace:
        decoder = decoder_on_gpu(config).train()
        decoder.activation_checkpointing = recipe.activation_checkpointing
        if recipe.compile:
            compile_fields(decoder, _no_event, backend=fusing_backend(trace))
        optimizer = make_optimizer(decoder, recipe)
        _make_moments(decoder, optimizer)
        setup = TrainingSetup(
            model=decoder,
            optimizer=optimizer,
            objective=make_objective(
                lambda _: config.corrections,
                _frozen(teacher, recipe) if teacher else None,
            ),
            recipe=recipe,
            world=World(device=GPU),
        )
        shape = num_passes * num_sequences, config.context_length

        def batch(_: int) -> Batch:
            return Batch.of_text(torch.zeros(shape, dtype=torch.int64))

        trace.restart()
        train(setup, Position(step=1), _hooks(batch))
    return trace


def _frozen(config: ModelConfig, recipe: TrainingSettings) -> Decoder:
    dtype = frozen_dtype(recipe.precision, GPU)
    return decoder_on_gpu(config, dtype).requires_grad_(False).eval()


def _make_moments(decoder: Decoder, optimizer: torch.optim.Optimizer) -> None:
    for parameter in decoder.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _no_event(name: str, **details: Any) -> None:
    assert name != "not compiled", details["text"]


def _hooks(batch: Any) -> Hooks:
    return Hooks(
        batch=batch,
        flops_per_token=lambda _: 0.0,
        validate=lambda _: {VALIDATION_METRIC: 0.0},
        report=lambda *_: None,
        event=_no_event,
        throughput=lambda _: {},
        save=lambda _: None,
        should_stop=lambda: False,
        should_save=lambda: False,
        end_step=lambda: None,
    )


def decoding(
    config: ModelConfig,
    *,
    batch_size: int = 1,
    prompt: int = 16,
    num_tokens: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Trace:
    """Trace the decoding of `num_tokens` tokens after the first, which reads the prompt.

    `options` are those of `iiet.generation.stream`.
    """
    trace = Trace(answer=0.0)
    with trace, torch.no_grad():
        decoder = decoder_on_gpu(config, dtype).eval()
        ids = torch.zeros(batch_size, prompt, dtype=torch.int64, device=GPU)
        steps = stream(decoder, ids, max_new_tokens=num_tokens + 1, **options)
        next(steps)
        trace.restart()
        for _ in steps:
            pass
    return trace
