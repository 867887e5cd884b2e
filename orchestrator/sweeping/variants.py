"""Plans of models from scratch: methods, iteration counts, learning rates and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iiet.methods import METHODS
from orchestrator.sweeping.trials import PlannedTrial, SweepPlan, finish_plan, suite_key
from orchestrator.training.first_stage import share_first_stages
from orchestrator.training.job import TrainingJob, job_key
from orchestrator.workspace.provenance import content_key


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model that a sweep trains from scratch."""

    label: str
    """What tables and pictures call it."""
    job: TrainingJob
    """Its training; the folder is where a pretraining run of the same settings would go."""
    group: str | None = None
    """What it is called apart from its seed, where the sweep has several seeds."""


def iterations_plan(
    variants: Sequence[Variant], *, suite: dict[str, Any], name: str | None = None
) -> SweepPlan:
    """Plan a sweep that pretrains several models from scratch, each a job.

    Args:
        variants: What is trained; those that come to the same job are one trial.
        suite: What is measured.
        name: Name of the sweep; made from its key when unset.
    """
    trials = []
    jobs = share_first_stages([variant.job for variant in variants])
    for variant, job in zip(variants, jobs, strict=True):
        config = job.config()
        is_baseline = not METHODS[config.method].has_corrections
        trials.append(
            PlannedTrial(
                key=content_key("trial", job_key(job), suite_key(suite)),
                role="baseline" if is_baseline else "trial",
                label=variant.label,
                model=config.to_dict(),
                folder=job.run_folder,
                job=job.to_dict(),
                checkpoint=None,
                suite=suite,
                seed=job.recipe.seed if variant.group else None,
                group=variant.group,
            )
        )
    unique = list({trial.key: trial for trial in trials}.values())
    num_seeds = len({v.job.recipe.seed for v in variants if v.group}) or 1
    num_requested = len(variants) // num_seeds
    return finish_plan("iterations", name, unique, suite, num_requested, teacher=None)
