"""What a pretraining will take, and whether it fits, before its tokens are prepared.

A dry run prints the estimate; a real run that does not fit is refused before text is read. Without
prepared tokens or a GPU, the estimate says what it assumes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.data.preparation import ExpectedTokens, expected_tokens, find_prepared
from orchestrator.planning.fit import ResourceRequest, check_fit
from orchestrator.planning.resources import FreeBytes, check_resources, local_free_bytes
from orchestrator.planning.training_estimate import TrainingEstimate
from orchestrator.settings import Settings
from orchestrator.training.model_config import build_model_config
from orchestrator.training.peak_flops import ASSUMED_GPU, ASSUMED_GPU_BYTES, installed_gpu
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.folders import Workspace

THIS_MACHINE = "this machine"


@dataclass(frozen=True, kw_only=True)
class PretrainingEstimate:
    """What is known of a pretraining before it begins."""

    settings: Settings
    tokens: ExpectedTokens
    training: TrainingEstimate
    problems: dict[str, str | None]
    """Place -> why the training does not fit there, None if it does. The first is this machine."""
    is_memory_known: bool
    """Whether this machine's memory was compared; not if `RAY_ADDRESS` names a cluster."""


def estimate_pretraining(settings: Settings, workspace: Workspace) -> PretrainingEstimate:
    """Estimate a pretraining; start and write nothing. The workspace need not exist.

    Raises:
        UserError: If no machine could run it: sizes that do not go together, missing files.
    """
    tokens, request = _request(settings, workspace)
    cluster = settings.cluster

    def check_here() -> None:
        check_resources(cluster.num_workers, cluster.num_gpus)
        _check_fit_here(settings, workspace, tokens, request)

    training = request.estimate()
    problems = {THIS_MACHINE: _problem(check_here)}
    if cluster.num_gpus and installed_gpu() is None:
        gpu = FreeBytes(memory=ASSUMED_GPU_BYTES, disk=None, place=f"an {ASSUMED_GPU}")
        problems[gpu.place] = _problem(lambda: check_fit(request, gpu))
    return PretrainingEstimate(
        settings=settings,
        tokens=tokens,
        training=training,
        problems=problems,
        is_memory_known=not os.environ.get("RAY_ADDRESS"),
    )


def check_pretraining(settings: Settings, workspace: Workspace) -> None:
    """Refuse a pretraining whose memory or disk this machine lacks, before its text is read.

    If its tokens are prepared, `check_trainings` decides: it knows the run folder, in which new
    checkpoints replace old ones.

    Raises:
        UserError: If it does not fit, or no machine could run it; says what would fit.
    """
    tokens, request = _request(settings, workspace)
    if not tokens.num_train_tokens:
        _check_fit_here(settings, workspace, tokens, request)


def _request(settings: Settings, workspace: Workspace) -> tuple[ExpectedTokens, ResourceRequest]:
    tokens = expected_tokens(settings.data, find_prepared(settings.data, workspace.tokens))
    cluster = settings.cluster
    return tokens, ResourceRequest(
        config=build_model_config(settings.model, vocab_size=tokens.vocab_size),
        recipe=settings.training,
        num_workers=cluster.num_gpus or cluster.num_workers,
        parallel=cluster.parallel,
        on_gpus=cluster.num_gpus > 0,
        model=settings.model,
    )


def _check_fit_here(
    settings: Settings, workspace: Workspace, tokens: ExpectedTokens, request: ResourceRequest
) -> None:
    free = local_free_bytes(
        workspace.root, num_workers=request.num_workers, num_gpus=settings.cluster.num_gpus
    )
    check_fit(request, free, new_bytes=tokens.new_bytes)


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None
