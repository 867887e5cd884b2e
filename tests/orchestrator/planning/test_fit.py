"""A training that does not fit is refused, and the proposed change does fit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from iiet.config import preset
from orchestrator.planning.fit import MeasureFree, check_fit, find_problems
from orchestrator.planning.planned_training import PlannedTraining, planned_training
from orchestrator.planning.price import PlannedWork, TrainingGroup
from orchestrator.planning.resources import FreeBytes
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.settings import ModelSettings, Settings, resolve_settings
from orchestrator.terminal.render import format_bytes
from orchestrator.training.model_config import build_model_config
from orchestrator.training.teacher_cache_policy import TeacherWork
from orchestrator.workspace.errors import UserError

GIB = 2**30


def request(
    *assignments: str, num_workers: int = 1, parallel: Literal["ddp", "fsdp"] | None = None
) -> PlannedTraining:
    given = ["model.preset=340m", "training.num_tokens_per_step=65536", *assignments]
    settings = resolve_settings({}, given)
    return PlannedTraining(
        config=build_model_config(settings.model, vocab_size=32000),
        recipe=settings.training,
        num_workers=num_workers,
        parallel=parallel,
        model=settings.model,
    )


def always(free: FreeBytes) -> MeasureFree:
    """Return a stand-in for `local_free_bytes` that always finds the same."""
    return lambda *_, **__: free


def check(asked: PlannedTraining, free: FreeBytes, new_token_bytes: int = 0) -> None:
    group = TrainingGroup(trainings=(asked,))
    work = PlannedWork(groups=[group], folder=Path(), new_token_bytes=new_token_bytes)
    check_fit(work, measure_free=always(free))


def refused(asked: PlannedTraining, free: FreeBytes) -> str:
    with pytest.raises(UserError) as caught:
        check(asked, free)
    return str(caught.value)


def follow(message: str) -> list[str]:
    """Return the assignments that a message proposes."""
    return re.findall(r"--set (\S+=[^\s;]+)", message)


def test_a_cluster_elsewhere_is_not_compared_with_this_machines_memory() -> None:
    work = PlannedWork(groups=[TrainingGroup(trainings=(request(),))], folder=Path())
    full = always(FreeBytes(memory=0, disk=None))
    with pytest.raises(UserError):
        check_fit(work, measure_free=full)
    check_fit(replace(work, address="ray.example:6379"), measure_free=full)


@pytest.mark.parametrize("gigabytes", [160, 80, 40, 24, 12, 8, 4, 2])
def test_the_proposed_change_fits(gigabytes: int) -> None:
    free = FreeBytes(memory=gigabytes * GIB, disk=None)
    message = refused(request(), free)
    assert "weights" in message
    assert "activations" in message
    assert f"{gigabytes} GiB free" in message
    assert follow(message)
    check(request(*follow(message)), free)


def test_the_smallest_change_comes_first() -> None:
    def proposal(gigabytes: float) -> str:
        free = FreeBytes(memory=int(gigabytes * GIB), disk=None)
        return refused(request(), free).partition("fits: ")[2]

    per_pass = {
        n: request().with_recipe(num_sequences_per_pass=n).worker_bytes / GIB for n in (1, 2, 16)
    }
    assert proposal(per_pass[16]) == "--set training.num_sequences_per_pass=16"
    assert proposal(per_pass[1]) == "--set training.num_sequences_per_pass=1"
    assert "activation_checkpointing=true" in proposal(per_pass[1] - 0.5)
    assert proposal(4).startswith("--set model.preset=55m")
    free = FreeBytes(memory=GIB // 2, disk=None)
    assert "no setting needs as little" in refused(request(), free)


def test_fsdp_is_proposed_if_the_settings_offer_it() -> None:
    asked = request("training.num_sequences_per_pass=1", num_workers=8, parallel="ddp")
    alone = asked.with_recipe(activation_checkpointing=True)
    free = FreeBytes(memory=alone.worker_bytes - GIB // 2, disk=None)
    message = refused(asked, free)
    assert "for each of 8 workers" in message
    assert "--set cluster.parallel=fsdp" in message
    without = request("training.num_sequences_per_pass=1", num_workers=8)
    assert "fsdp" not in refused(without, free)


def test_a_full_disk_is_refused_before_the_first_checkpoint() -> None:
    asked = request("training.num_checkpoints_kept=4", "training.num_steps=100000")
    one = asked.checkpoint_bytes
    free = FreeBytes(memory=None, disk=3 * one)
    message = refused(asked, free)
    assert "training.num_checkpoints_kept=2" in message
    assert "--workspace" in message
    assert f"checkpoints {format_bytes(5 * one)}" in message
    check(request("training.num_steps=100000", *follow(message)), free)
    # Checkpoints that this run has written already are replaced, not added to.
    check(replace(asked, present_bytes=2 * one), free)
    with pytest.raises(UserError, match="tokens"):
        check(asked, FreeBytes(memory=None, disk=5 * one), new_token_bytes=one)


def test_unknown_free_bytes_are_not_checked() -> None:
    check(request(), FreeBytes(memory=None, disk=None, place="the cluster at x"))


def test_proposals_keep_explicit_sizes() -> None:
    model = ModelSettings(preset="1.3b", dim=2048, num_heads=16, num_layers=24, ffn_dim=5432)
    asked = PlannedTraining(
        config=build_model_config(model, vocab_size=32000), recipe=request().recipe, model=model
    )
    # No preset makes a model with these explicit sizes smaller, so none is tried.
    assert "no setting needs as little" in refused(asked, FreeBytes(memory=2 * GIB, disk=None))


def test_a_teachers_weights_are_counted() -> None:
    recipe = Settings().distillation.training
    config = preset("tiny")
    with_teacher = PlannedTraining(config=config, recipe=recipe, teacher=config).memory
    without = PlannedTraining(config=config, recipe=recipe).memory
    assert with_teacher.weights == 2 * without.weights


def test_trials_that_do_not_fit_in_memory_together_are_refused(tiny_plan: SweepPlan) -> None:
    trainings = [planned_training(trial.job) for trial in tiny_plan.trials if trial.job]

    def check(gigabytes: float, at_once: int) -> None:
        group = TrainingGroup(trainings=tuple(trainings), at_once=at_once, is_trials=True)
        free = FreeBytes(memory=int(gigabytes * GIB), disk=None)
        check_fit(PlannedWork(groups=[group], folder=Path()), measure_free=always(free))

    # Each takes little more memory than a process does.
    check(1.3, 2)
    with pytest.raises(UserError, match=r"sweep\.trials_at_once=2"):
        check(1.3, 4)
    with pytest.raises(UserError, match="training would take"):
        check(0.1, 1)


def test_trials_share_the_memory_of_their_gpu(tiny_plan: SweepPlan) -> None:
    own = [planned_training(trial.job) for trial in tiny_plan.trials if trial.job]
    trainings = tuple(replace(training, on_gpus=True) for training in own)
    needed = max(training.worker_bytes for training in trainings)

    def check(at_once: int, sharing: int) -> None:
        group = TrainingGroup(
            trainings=trainings, at_once=at_once, sharing_a_gpu=sharing, is_trials=True
        )
        check_fit(
            PlannedWork(groups=[group], folder=Path()),
            measure_free=lambda *_, num_gpus=0, **__: FreeBytes(
                memory=3 * needed if num_gpus else None, disk=None
            ),
        )

    check(3, 3)
    check(3, 4)
    check(16, 1)
    with pytest.raises(UserError, match="shared by 4 trials, has"):
        check(4, 4)


@pytest.mark.parametrize(
    ("num_gpus", "at_once", "words"),
    [
        # 2 GiB for each of 8 processes, and the pinned buffers of a checkpoint of 3.8 GiB.
        (8, 1, r"training on 8 GPUs would take about 21\.\d GiB .* --set cluster\.num_gpus=7"),
        (1, 8, r"8 trainings at once on 8 GPUs .* --set sweep\.trials_at_once=2"),
        (32, 1, r"on 32 GPUs .* --set cluster\.num_gpus=7"),
    ],
)
def test_workers_on_gpus_need_memory_of_the_machine(
    num_gpus: int, at_once: int, words: str
) -> None:
    def check(host_gigabytes: float) -> None:
        asked = request("training.num_sequences_per_pass=1", num_workers=num_gpus)
        asked = replace(asked, on_gpus=True)
        group = TrainingGroup(trainings=(asked,), at_once=at_once, is_trials=at_once > 1)
        gpu, host = FreeBytes(memory=79 * GIB, disk=None), int(host_gigabytes * GIB)
        check_fit(
            PlannedWork(groups=[group], folder=Path()),
            measure_free=lambda *_, num_gpus=0, **__: (
                gpu if num_gpus else FreeBytes(memory=host, disk=None)
            ),
        )

    check(160)
    with pytest.raises(UserError, match=words):
        check(20)


def test_a_machine_too_small_for_one_worker_is_offered_a_smaller_model() -> None:
    asked = replace(request("training.num_sequences_per_pass=1"), on_gpus=True)
    group = TrainingGroup(trainings=(asked,))
    free = FreeBytes(memory=4 * GIB, disk=None)
    with pytest.raises(UserError, match=r"it has 4 GiB free; .* --set model\.preset=55m"):
        check_fit(
            PlannedWork(groups=[group], folder=Path()),
            measure_free=lambda *_, num_gpus=0, **__: (
                FreeBytes(memory=79 * GIB, disk=None) if num_gpus else free
            ),
        )


def test_trainings_that_fit_on_the_disk_only_one_by_one_are_refused(tiny_plan: SweepPlan) -> None:
    trainings = [planned_training(trial.job) for trial in tiny_plan.trials if trial.job]
    assert len(trainings) == 4
    one = 12 * 10_146  # Bytes of a checkpoint.

    def check(num_checkpoints: float, *, teacher_bytes: int = 0, **recipe: int) -> None:
        group = TrainingGroup(
            trainings=tuple(training.with_recipe(**recipe) for training in trainings),
            at_once=2,
            teacher=TeacherWork(num_bytes=teacher_bytes),
        )
        free = FreeBytes(memory=None, disk=int(num_checkpoints * one))
        check_fit(PlannedWork(groups=[group], folder=Path()), measure_free=always(free))

    check(4)
    with pytest.raises(
        UserError, match=r"4 trainings .* 475 KiB \(checkpoints .* has 357 KiB free"
    ):
        check(3)
    with pytest.raises(
        UserError, match=r"teacher outputs 119 KiB.*--set distillation\.teacher_cache=live"
    ):
        check(4.5, teacher_bytes=one)
    check(5, teacher_bytes=one)
    # Each keeps two, and each that runs at the same time writes one more.
    often = {"checkpoint_every_steps": 10, "num_checkpoints_kept": 2}
    check(8 + 2, **often)
    with pytest.raises(UserError, match=r"--set distillation\.training\.num_checkpoints_kept=1;"):
        check(8, **often)


def test_an_assumed_gpu_stands_beside_a_machine_that_has_none() -> None:
    asked = replace(request("training.num_sequences_per_pass=1"), on_gpus=True)

    def refuse() -> None:
        raise UserError("no GPU here")

    group = TrainingGroup(trainings=(asked,))
    assert find_problems(PlannedWork(groups=[group], folder=Path()), refuse) == {
        "this machine": "no GPU here",
        "an H100": None,
    }
    too_large = TrainingGroup(trainings=(request("training.num_sequences_per_pass=32"),))
    (problem,) = find_problems(
        PlannedWork(groups=[too_large], folder=Path()), lambda: None
    ).values()
    assert problem
    assert "training would take about" in problem
