"""A training that does not fit is refused, with the settings that take less."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import assert_names

from iiet.cost import num_parameters
from iiet.model.config import preset
from orchestrator.planning.devices import Devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.fit import (
    find_problems,
    out_of_memory_explained,
    reasons_not_to_fit,
    sequences_if_uncompiled,
)
from orchestrator.planning.machine import FreeBytes
from orchestrator.planning.price import price_of
from orchestrator.records.trial import SweepTrials
from orchestrator.settings import Settings, resolve_settings
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.render import format_bytes
from orchestrator.training.world import World
from orchestrator.workspace.errors import DeviceError

GIB = 2**30
ONE_PER_PASS = "training.num_sequences_per_pass=1"
RECOMPUTED = "training.activation_checkpointing=true"


def request(*assignments: str, **devices: Any) -> Estimate:
    with_size = ["model.preset=340m", "training.num_tokens_per_step=65536", *assignments]
    settings = resolve_settings({}, with_size)
    return Estimate(
        config=settings.model.build(vocab_size=32000),
        recipe=settings.training,
        devices=Devices(**{"parallel": settings.cluster.parallel, **devices}),
    )


def refused(
    *trainings: Estimate, memory: float | None = None, disk: float | None = None, **price: Any
) -> str:
    """Return why trainings do not fit on a machine with these free bytes; GPUs have the same."""
    needed = price_of(trainings, Path(), **price).disk
    memory_bytes = None if memory is None else int(memory)
    disk_bytes = None if disk is None else int(disk)
    gpus = () if memory_bytes is None else (memory_bytes,)
    free = FreeBytes(memory=memory_bytes, gpus=gpus, disk=disk_bytes)
    return ". ".join(reasons_not_to_fit(trainings, needed, free))


def trials_of(plan: SweepTrials, **devices: Any) -> list[Estimate]:
    estimates = [Estimate.of(trial.job) for trial in plan.trials if trial.job]
    return [
        replace(estimate, devices=Devices(are_trials=True, **devices)) for estimate in estimates
    ]


@pytest.mark.parametrize("free", [10 * GIB, 24 * GIB, 79 * GIB, 200 * GIB])
def test_a_training_that_is_not_compiled_gets_passes_that_fit(free, tiny_job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
    assert sequences_if_uncompiled(tiny_job(), World()) is None, "a CPU's form has no compiler"
    recipe = ("training.num_sequences_per_pass=8", "training.precision=bf16")
    planned = request("model.corrections=3", *recipe, on_gpus=True)
    job = tiny_job().model_copy(update={"model": planned.config, "recipe": planned.recipe})
    number = sequences_if_uncompiled(job, World(device="cuda:0"))

    def plan_for(num_sequences: int) -> int:
        changes = {"compile": False, "num_sequences_per_pass": num_sequences}
        return replace(planned, recipe=planned.recipe.model_copy(update=changes)).worker_bytes

    assert number is not None
    assert number == 1 or plan_for(number) <= free
    assert number == 8 or plan_for(number + 1) > free
    assert (number == 8) == (free > 100 * GIB), "compiled, 8 fit 79 GiB"
    assert planned.worker_bytes < 79 * GIB


def test_the_memory_of_a_worker_is_compared_with_what_is_free():
    assert refused(request()) == "", "what is unknown is not checked"
    message = refused(request(), memory=12 * GIB)
    assert_names(message, "weights", "activations", "12 GiB free")
    for name in ("num_sequences_per_pass", "activation_checkpointing", "cluster.parallel=fsdp"):
        assert name in message
    needed = request(ONE_PER_PASS, RECOMPUTED).worker_bytes
    assert refused(request(ONE_PER_PASS, RECOMPUTED), memory=needed) == ""
    assert refused(request(ONE_PER_PASS, RECOMPUTED), memory=needed - 1)
    message = refused(request(ONE_PER_PASS, num_workers=8), memory=8 * (needed - GIB // 2))
    assert "8 workers" in message
    assert f"{format_bytes(needed - GIB // 2)} free for each" in message


def test_the_disk_holds_all_checkpoints_that_exist_at_one_time(tiny_plan):
    planned = request("training.num_checkpoints_kept=4", "training.num_steps=100000")
    one_checkpoint = planned.checkpoint_bytes
    message = refused(planned, disk=3 * one_checkpoint)
    assert "--workspace" in message
    assert f"checkpoints {format_bytes(5 * one_checkpoint)}" in message
    assert refused(planned, disk=5 * one_checkpoint) == ""
    # Checkpoints that this run has written already are replaced, not added to.
    assert (
        refused(replace(planned, present_bytes=2 * one_checkpoint), disk=3 * one_checkpoint) == ""
    )
    assert "tokens" in refused(planned, disk=5 * one_checkpoint, new_token_bytes=one_checkpoint)

    one_checkpoint = 12 * 10_146
    trials = trials_of(tiny_plan, at_once=2)
    assert len(trials) == 4
    assert refused(*trials, disk=4 * one_checkpoint) == ""
    message = r"the run would write about 475 KiB \(checkpoints .* has 357 KiB free"
    assert re.search(message, refused(*trials, disk=3 * one_checkpoint))
    # Each training keeps two, and each that runs at the same time writes one more.
    often = {"checkpoint_every_steps": 5, "num_checkpoints_kept": 2}
    trials = [replace(trial, recipe=trial.recipe.model_copy(update=often)) for trial in trials]
    assert refused(*trials, disk=(8 + 2) * one_checkpoint) == ""
    assert "1.16 MiB" in refused(*trials, disk=8 * one_checkpoint)


def test_trials_share_the_memory_of_the_machine_or_of_their_gpu(tiny_plan):
    # A trial takes little more memory than a process does.
    assert refused(*trials_of(tiny_plan, at_once=2), memory=1.3 * GIB) == ""
    message = refused(*trials_of(tiny_plan, at_once=4), memory=1.3 * GIB)
    assert "4 workers" in message
    assert "sweep.trials_at_once" in message
    alone = refused(*trials_of(tiny_plan), memory=0.1 * GIB)
    assert "training would take" in alone
    assert "trials_at_once" not in alone

    def on_gpus(at_once: int, sharing: int) -> str:
        trials = trials_of(tiny_plan, on_gpus=True, at_once=at_once, sharing_a_gpu=sharing)
        return refused(*trials, memory=3 * max(trial.worker_bytes for trial in trials))

    assert on_gpus(3, 3) == on_gpus(3, 4) == on_gpus(16, 1) == ""
    assert "4 workers" in on_gpus(4, 4)


def test_a_teacher_of_more_layers_takes_its_own_weights():
    recipe = Settings().distillation.training
    student = preset("tiny", num_layers=2)
    teacher = preset("tiny", num_layers=6)
    memory = Estimate(config=student, recipe=recipe, teacher=teacher).worker_memory
    alone = Estimate(config=student, recipe=recipe).worker_memory
    assert memory["weights"] == alone["weights"] + 4 * num_parameters(teacher)


def test_each_place_has_its_own_problems():
    on_gpu = [request(ONE_PER_PASS, on_gpus=True)]
    problems = find_problems(on_gpu, {}, Path(), LOCAL, "no GPU here")
    assert problems == {"this machine": "no GPU here", "an H100": None}
    for gpu, fits in ("RTX-4090", False), ("A100-80GB", True):
        on_named = [request("training.num_sequences_per_pass=4", on_gpus=True, gpu=gpu)]
        problem = find_problems(on_named, {}, Path(), LOCAL, None)[f"an {gpu}"]
        assert (problem is None) == fits, problem
    huge = [request("training.num_tokens_per_step=16777216")]
    (problem,) = find_problems(huge, {}, Path(), LOCAL, None).values()
    assert "training would take about" in str(problem)
    far = find_problems(huge, {}, Path(), "ray.example:6379", "no GPU there")
    assert far == {"the cluster at ray.example:6379 (its memory is unknown)": "no GPU there"}


CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which 1.50 GiB is free. Including non-PyTorch memory, this process has 77.6 GiB memory in use."
)


def test_what_pytorch_saw_what_was_planned_and_what_to_type(tiny_job):
    job = tiny_job(num_tokens_per_step=2**16)
    with pytest.raises(DeviceError) as caught, out_of_memory_explained(job, World()):
        raise torch.OutOfMemoryError(CUDA_MESSAGE)
    text = str(caught.value)
    assert "total capacity of 79.15 GiB of which 1.50 GiB is free)" in text
    assert "its plan was" in text
    assert "activations" in text
    assert "training.num_sequences_per_pass" in text
    assert "Including" not in text
    with pytest.raises(RuntimeError, match="else"), out_of_memory_explained(tiny_job(), World()):
        raise RuntimeError("else")
