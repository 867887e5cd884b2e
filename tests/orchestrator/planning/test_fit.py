"""A training that does not fit is refused, and the proposed change does fit."""

from __future__ import annotations

import re

import pytest

from iiet.config import preset
from orchestrator.planning.fit import ResourceRequest, check_fit, needed_memory
from orchestrator.planning.resources import FreeBytes
from orchestrator.settings import ModelSettings, Settings, resolve_settings
from orchestrator.terminal.formatting import format_bytes
from orchestrator.training.model_config import build_model_config
from orchestrator.workspace.errors import UserError

GIB = 2**30


def request(
    *assignments: str, num_workers: int = 1, parallel: str | None = None
) -> ResourceRequest:
    given = ["model.preset=340m", "training.num_tokens_per_step=65536", *assignments]
    settings = resolve_settings({}, given)
    return ResourceRequest(
        config=build_model_config(settings.model, vocab_size=32000),
        recipe=settings.training,
        num_workers=num_workers,
        parallel=parallel,
        model=settings.model,
    )


def refused(asked: ResourceRequest, free: FreeBytes) -> str:
    with pytest.raises(UserError) as caught:
        check_fit(asked, free)
    return str(caught.value)


def follow(message: str) -> tuple[list[str], str]:
    """Return the assignments and the preset that a message proposes."""
    return re.findall(r"--set (\S+=[^\s;]+)", message), (
        re.findall(r"--preset (\S+)", message) or ["340m"]
    )[0]


@pytest.mark.parametrize("gigabytes", [160, 80, 40, 24, 12, 8, 4, 2])
def test_the_proposed_change_fits(gigabytes: int) -> None:
    free = FreeBytes(memory=gigabytes * GIB, disk=None)
    message = refused(request(), free)
    assert "weights" in message
    assert "activations" in message
    assert f"{gigabytes}.0 GiB free" in message
    settings, name = follow(message)
    assert settings or name != "340m"
    check_fit(request(*settings, f"model.preset={name}"), free)


def test_the_smallest_change_comes_first() -> None:
    def proposal(gigabytes: float) -> str:
        free = FreeBytes(memory=int(gigabytes * GIB), disk=None)
        return refused(request(), free).partition("fits: ")[2]

    per_pass = {
        n: needed_memory(request().estimate(num_sequences_per_pass=n)) / GIB for n in (1, 2, 16)
    }
    assert proposal(per_pass[16]) == "--set training.num_sequences_per_pass=16"
    assert proposal(per_pass[1]) == "--set training.num_sequences_per_pass=1"
    assert "activation_checkpointing=true" in proposal(per_pass[1] - 0.5)
    assert proposal(4).startswith("--preset 55m")
    free = FreeBytes(memory=GIB // 2, disk=None)
    assert "no preset fits" in refused(request(), free)


def test_fsdp_is_proposed_if_the_settings_offer_it() -> None:
    asked = request("training.num_sequences_per_pass=1", num_workers=8, parallel="ddp")
    alone = asked.estimate(activation_checkpointing=True)
    free = FreeBytes(memory=needed_memory(alone) - GIB // 2, disk=None)
    message = refused(asked, free)
    assert "for each of 8 workers" in message
    assert "--set cluster.parallel=fsdp" in message
    without = request("training.num_sequences_per_pass=1", num_workers=8)
    assert "fsdp" not in refused(without, free)


def test_a_full_disk_is_refused_before_the_first_checkpoint() -> None:
    asked = request("training.num_checkpoints_kept=4", "training.num_steps=100000")
    one = asked.estimate().checkpoint_bytes
    free = FreeBytes(memory=None, disk=3 * one)
    message = refused(asked, free)
    assert "training.num_checkpoints_kept=2" in message
    assert "--workspace" in message
    assert format_bytes(one) in message
    settings, _ = follow(message)
    check_fit(request("training.num_steps=100000", *settings), free)
    # Checkpoints that this run has written already are replaced, not added to.
    check_fit(asked, free, present_bytes=2 * one)
    with pytest.raises(UserError, match="tokens"):
        check_fit(asked, FreeBytes(memory=None, disk=5 * one), new_bytes=one)


def test_unknown_free_bytes_are_not_checked() -> None:
    check_fit(request(), FreeBytes(memory=None, disk=None, place="the cluster at x"))


def test_proposals_keep_explicit_sizes() -> None:
    model = ModelSettings(preset="1.3b", dim=2048, num_heads=16, num_layers=24, ffn_dim=5432)
    asked = ResourceRequest(
        config=build_model_config(model, vocab_size=32000), recipe=request().recipe, model=model
    )
    # No preset makes a model with these explicit sizes smaller, so none is proposed.
    assert "no preset fits" in refused(asked, FreeBytes(memory=2 * GIB, disk=None))


def test_a_teachers_weights_are_counted() -> None:
    recipe = Settings().distillation.training
    config = preset("tiny")
    with_teacher = ResourceRequest(config=config, recipe=recipe, teacher=config).estimate().memory
    without = ResourceRequest(config=config, recipe=recipe).estimate().memory
    assert with_teacher.weights == 2 * without.weights
