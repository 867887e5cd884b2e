"""A training that does not fit is refused, and the proposed change does fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from iiet.config import preset
from orchestrator.models.config import build_model_config
from orchestrator.planning.estimate import (
    LARGEST_SHARE,
    Devices,
    Estimate,
    check_fit,
    find_problems,
    out_of_memory_explained,
    price_of,
    smaller_settings,
)
from orchestrator.planning.machine import FreeBytes
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import SweepPlan
from orchestrator.settings import Settings, resolve_settings
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.render import format_bytes
from orchestrator.training.devices import World
from orchestrator.training.teacher_cache import TeacherWork
from orchestrator.workspace.errors import DeviceError, UserError

GIB = 2**30
ONE_PER_PASS = "training.num_sequences_per_pass=1"


def request(
    *assignments: str,
    num_workers: int = 1,
    parallel: Literal["ddp", "fsdp"] | None = None,
    **devices: Any,
) -> Estimate:
    given = ["model.preset=340m", "training.num_tokens_per_step=65536", *assignments]
    settings = resolve_settings({}, given)
    return Estimate(
        config=build_model_config(settings.model, vocab_size=32000),
        recipe=settings.training,
        devices=Devices(num_workers=num_workers, parallel=parallel, **devices),
    )


def check(
    *trainings: Estimate,
    memory: float | None = None,
    disk: float | None = None,
    host: float | None = None,
    **price: Any,
) -> None:
    """Check trainings on a machine with these free bytes; `host` is its memory beside GPUs."""

    needed = price_of(trainings, Path(), **price).disk
    gpus = () if memory is None else (int(memory),)
    machine, disk = (each and int(each) for each in (memory if host is None else host, disk))
    check_fit(trainings, needed, FreeBytes(memory=machine, gpus=gpus, disk=disk))


def refused(*trainings: Estimate, **free: Any) -> str:
    with pytest.raises(UserError) as caught:
        check(*trainings, **free)
    return str(caught.value)


def follow(message: str) -> list[str]:
    """Return the assignments that a message proposes."""
    return re.findall(r"--set (\S+=[^\s;]+)", message)


def trials_of(plan: SweepPlan, **devices: Any) -> list[Estimate]:
    found = [Estimate.of(trial.job) for trial in plan.trials if trial.job]
    return [replace(each, devices=Devices(are_trials=True, **devices)) for each in found]


def test_a_cluster_elsewhere_is_not_compared_with_this_machines_memory() -> None:
    assert "0 B free" in refused(request(), memory=0)
    huge = request("training.num_tokens_per_step=16777216")
    far = find_problems([huge], {}, Path(), "ray.example:6379")
    assert far == {"this machine (the cluster's memory is unknown)": None}
    check(request())  # What is unknown is not checked.


@pytest.mark.parametrize("gigabytes", [160, 80, 40, 24, 12])
def test_the_proposed_change_fits(gigabytes: int) -> None:
    message = refused(request(), memory=gigabytes * GIB)
    assert "weights" in message
    assert "activations" in message
    assert f"{gigabytes} GiB free" in message
    assert follow(message)
    check(request(*follow(message)), memory=gigabytes * GIB)


def test_the_smallest_change_comes_first() -> None:
    def proposal(gigabytes: float) -> str:
        return refused(request(), memory=gigabytes * GIB).partition("fits: ")[2]

    per_pass = {
        number: request(f"training.num_sequences_per_pass={number}").worker_bytes / GIB
        for number in (1, 2, 16)
    }
    assert proposal(per_pass[16]) == "--set training.num_sequences_per_pass=16"
    assert proposal(per_pass[1]) == f"--set {ONE_PER_PASS}"
    assert "activation_checkpointing=true" in proposal(per_pass[1] - 0.5)
    assert "no setting needs as little" in refused(request(), memory=GIB // 2)


def test_fsdp_is_proposed_if_the_settings_offer_it() -> None:
    asked = request(ONE_PER_PASS, num_workers=8, parallel="ddp")
    alone = request(
        ONE_PER_PASS, "training.activation_checkpointing=true", num_workers=8, parallel="ddp"
    )
    most = alone.worker_bytes - GIB // 2
    message = refused(asked, memory=8 * most)
    assert "for each of 8 workers" in message
    assert f"{format_bytes(most)} free for each" in message
    assert "--set cluster.parallel=fsdp" in message
    assert "fsdp" not in refused(request(ONE_PER_PASS, num_workers=8), memory=8 * most)


def test_a_full_disk_is_refused_before_the_first_checkpoint() -> None:
    asked = request("training.num_checkpoints_kept=4", "training.num_steps=100000")
    one = asked.checkpoint_bytes
    message = refused(asked, disk=3 * one)
    assert "--workspace" in message
    assert f"checkpoints {format_bytes(5 * one)}" in message
    check(asked, disk=5 * one)
    # Checkpoints that this run has written already are replaced, not added to.
    check(replace(asked, present_bytes=2 * one), disk=3 * one)
    assert "tokens" in refused(asked, disk=5 * one, new_token_bytes=one)


def test_a_teachers_weights_are_counted() -> None:
    recipe = Settings().distillation.training
    config = preset("tiny")
    with_teacher = Estimate(config=config, recipe=recipe, teacher=config).worker_memory
    without = Estimate(config=config, recipe=recipe).worker_memory
    assert with_teacher["weights"] == 2 * without["weights"]


def test_trials_that_do_not_fit_in_memory_together_are_refused(tiny_plan: SweepPlan) -> None:
    # Each takes little more memory than a process does.
    check(*trials_of(tiny_plan, at_once=2), memory=1.3 * GIB)
    message = refused(*trials_of(tiny_plan, at_once=4), memory=1.3 * GIB)
    assert "4 trainings at once" in message
    assert "set sweep.trials_at_once lower" in message
    assert "training would take" in refused(*trials_of(tiny_plan), memory=0.1 * GIB)


def test_trials_share_the_memory_of_their_gpu(tiny_plan: SweepPlan) -> None:
    def trials(at_once: int, sharing: int) -> list[Estimate]:
        return trials_of(tiny_plan, on_gpus=True, at_once=at_once, sharing_a_gpu=sharing)

    gpu = 3 * max(each.worker_bytes for each in trials(1, 1))
    for at_once, sharing in ((3, 3), (3, 4), (16, 1)):
        check(*trials(at_once, sharing), memory=gpu, host=GIB * GIB)
    assert "shared by 4 trials, has" in refused(*trials(4, 4), memory=gpu, host=GIB * GIB)


@pytest.mark.parametrize(
    ("num_gpus", "at_once", "words"),
    [
        # 2 GiB for each of 8 processes, and the pinned buffers of a checkpoint of 3.8 GiB.
        (8, 1, r"training on 8 GPUs would take about 23\.6 GiB .* set cluster\.num_gpus lower"),
        (1, 8, r"8 trainings at once on 8 GPUs .* set sweep\.trials_at_once lower"),
    ],
)
def test_workers_on_gpus_need_memory_of_the_machine(
    num_gpus: int, at_once: int, words: str
) -> None:
    asked = request(
        ONE_PER_PASS, num_workers=num_gpus, on_gpus=True, at_once=at_once, are_trials=at_once > 1
    )
    trainings = [asked] * at_once
    check(*trainings, memory=79 * GIB, host=160 * GIB)
    assert re.search(words, refused(*trainings, memory=79 * GIB, host=20 * GIB))


def test_trainings_that_fit_on_the_disk_only_one_by_one_are_refused(tiny_plan: SweepPlan) -> None:
    one = 12 * 10_146  # Bytes of a checkpoint.
    trials = trials_of(tiny_plan, at_once=2)
    assert len(trials) == 4
    check(*trials, disk=4 * one)
    message = refused(*trials, disk=3 * one)
    assert re.search(
        r"the run would write about 475 KiB \(checkpoints .* has 357 KiB free", message
    )
    stored = TeacherWork(num_bytes=one)
    assert "teacher outputs 119 KiB" in refused(*trials, disk=4.5 * one, teacher=stored)
    check(*trials, disk=5 * one, teacher=stored)
    # Each keeps two, and each that runs at the same time writes one more.
    often = {"checkpoint_every_steps": 10, "num_checkpoints_kept": 2}
    trials = [replace(each, recipe=each.recipe.model_copy(update=often)) for each in trials]
    check(*trials, disk=(8 + 2) * one)
    assert "1.16 MiB" in refused(*trials, disk=8 * one)


def test_an_assumed_gpu_stands_beside_a_machine_that_has_none() -> None:
    def refuse() -> None:
        raise UserError("no GPU here")

    on_gpu = [request(ONE_PER_PASS, on_gpus=True)]
    found = find_problems(on_gpu, {}, Path(), LOCAL, refuse)
    assert found == {"this machine": "no GPU here", "an H100": None}
    too_large = [request("training.num_tokens_per_step=16777216")]
    (problem,) = find_problems(too_large, {}, Path(), LOCAL).values()
    assert "training would take about" in str(problem)


CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which 1.50 GiB is free. Including non-PyTorch memory, this process has 77.6 GiB memory in use."
)


@pytest.mark.parametrize(
    ("preset", "assignments", "change"),
    [
        ("340m", (), "training.num_sequences_per_pass=4"),
        ("340m", (ONE_PER_PASS,), "training.activation_checkpointing=true"),
        ("1.3b", (ONE_PER_PASS, "training.activation_checkpointing=true"), "cluster.parallel=fsdp"),
    ],
)
def test_the_proposal_takes_clearly_less_than_the_plan_that_failed(
    preset: str, assignments: tuple[str, ...], change: str
) -> None:
    given = f"model.preset={preset}", *assignments
    failed = request(*given, num_workers=4, parallel="ddp", on_gpus=True)
    most = int(LARGEST_SHARE * failed.worker_bytes)
    changes = smaller_settings(failed, most)
    assert changes == [change]
    parallel = resolve_settings({}, changes).cluster.parallel
    follower = request(*given, *changes, num_workers=4, parallel=parallel, on_gpus=True)
    assert follower.worker_bytes <= most


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
    with pytest.raises(RuntimeError, match="else"), out_of_memory_explained(tiny_job(), World()):
        raise RuntimeError("else")
