"""A training that runs out of a GPU's memory ends with a setting that takes clearly less."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from orchestrator.planning.out_of_memory import (
    LARGEST_SHARE,
    describe_smaller,
    out_of_memory_explained,
)
from orchestrator.planning.planned_training import PlannedTraining
from orchestrator.records.training import TrainingJob
from orchestrator.settings import resolve_settings
from orchestrator.training.distributed import World
from orchestrator.training.model_config import build_model_config
from orchestrator.workspace.errors import DeviceError

CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which 1.50 GiB is free. Including non-PyTorch memory, this process has 77.6 GiB memory in use."
)


def planned(*assignments: str) -> PlannedTraining:
    settings = resolve_settings({}, ["training.num_tokens_per_step=65536", *assignments])
    return PlannedTraining(
        config=build_model_config(settings.model, vocab_size=32000),
        recipe=settings.training,
        num_workers=4,
        parallel="ddp",
        on_gpus=True,
        model=settings.model,
    )


@pytest.mark.parametrize(
    ("preset", "assignments", "words"),
    [
        ("340m", (), "less: --set training.num_sequences_per_pass=4;"),
        ("340m", ("training.num_sequences_per_pass=1",), "training.activation_checkpointing=true"),
        (
            "1.3b",
            ("training.num_sequences_per_pass=1", "training.activation_checkpointing=true"),
            "less: --set cluster.parallel=fsdp;",
        ),
    ],
)
def test_the_proposal_takes_clearly_less_than_the_plan_that_failed(
    preset: str, assignments: tuple[str, ...], words: str
) -> None:
    failed = planned(f"model.preset={preset}", *assignments)
    text = describe_smaller(failed)
    assert re.search(words, text), text
    change = text.partition("clearly less: ")[2].partition(";")[0].split()[1::2]
    settings = resolve_settings(
        {}, [f"model.preset={preset}", "training.num_tokens_per_step=65536", *assignments, *change]
    )
    follower = replace(failed, recipe=settings.training, parallel=settings.cluster.parallel)
    assert follower.worker_bytes <= LARGEST_SHARE * failed.worker_bytes


def test_what_pytorch_saw_what_was_planned_and_what_to_type(
    tiny_job: Callable[..., TrainingJob],
) -> None:
    job = tiny_job(num_tokens_per_step=2**16)
    with pytest.raises(DeviceError) as caught, out_of_memory_explained(job, World()):
        raise torch.OutOfMemoryError(CUDA_MESSAGE)
    text = str(caught.value)
    assert "total capacity of 79.15 GiB of which 1.50 GiB is free)" in text
    assert "its plan was" in text
    assert "activations" in text
    assert "--set training.num_sequences_per_pass=" in text
    assert "Including" not in text


def test_other_errors_stay_what_they_are(tiny_job: Callable[..., TrainingJob]) -> None:
    with pytest.raises(RuntimeError, match="else"), out_of_memory_explained(tiny_job(), World()):
        raise RuntimeError("else")
