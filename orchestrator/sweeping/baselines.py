"""Find the baselines of a teacher in a workspace: same tokens, shape and recipe.

Their number of layers is the teacher's, or one that the settings ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iiet.config import ModelConfig
from orchestrator.records.training import TrainingOutcome
from orchestrator.settings import TrainingSettings
from orchestrator.sweeping.model_plans import model_label, values_of_model
from orchestrator.terminal.render import format_count
from orchestrator.training.checkpoint import check_checkpoint, load_config, load_provenance
from orchestrator.training.job import NON_KEY_FIELDS
from orchestrator.training.model_lookup import run_folders
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import last_recorded
from orchestrator.workspace.layout import DONE_NAME, Workspace, checkpoint_name, find_checkpoints


@dataclass(frozen=True)
class Baselines:
    """Baselines of a teacher."""

    found: dict[str, Path]
    """Label to checkpoint."""
    left_out: dict[str, str]
    """Name of a run that cannot be a baseline, to the reason."""


def find_baselines(
    workspace: Workspace, teacher: Path, layers: Mapping[str, int | tuple[int, ...]] | None = None
) -> Baselines:
    """Return the workspace's newest models without corrections that can be a teacher's baselines.

    Damaged runs are reported. A run that was trained differently is reported only if there is no
    other model of its kind.

    Args:
        layers: Numbers of layers that differ from the teacher's, as in `sweep.num_layers`.
    """
    found: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    unlike: dict[str, tuple[str, str]] = {}
    full = load_config(teacher)
    wanted = _comparable(full, load_provenance(teacher))
    for run in sorted(run_folders(workspace), key=last_recorded):
        damage: list[UserError] = []
        for checkpoint in reversed(find_checkpoints(run)):
            try:
                config, provenance = load_config(checkpoint), load_provenance(checkpoint)
                break
            except UserError as error:
                damage.append(error)
        else:
            if damage:
                left_out[run.name] = f"the run {run.name} is left out: {damage[0]}"
            continue
        if config.corrections.num_corrections or "imported" in provenance:
            continue

        label, number = model_label(config.method, 0), config.num_layers
        asked = values_of_model(layers or {}, (label, config.method), default=full.num_layers)
        if number in asked and number != full.num_layers:
            label = model_label(config.method, 0, number)
        own = {"model.num_layers": number} if number in asked else {}
        reason = _difference(_comparable(config, provenance), wanted | own)
        if not reason and number not in asked:
            reason = f"it has {format_count(number, 'layer')}, which sweep.num_layers leaves out"
        if not reason and not (run / DONE_NAME).exists():
            reason = "its training is not finished"
        if reason:
            unlike[label] = (run.name, f"{label} is left out: {reason}")
            continue

        remedy = "delete it, and the same training again writes it"
        try:
            outcome = TrainingOutcome.read(run / DONE_NAME, remedy=remedy)
            assert outcome, "the file exists"
            check_checkpoint(run / checkpoint_name(outcome.step))
            found[label] = run / checkpoint_name(outcome.step)
        except UserError as error:
            left_out[run.name] = f"{label} is left out: {error}"
    left_out |= dict(pair for label, pair in unlike.items() if label not in found)
    return Baselines(found, left_out)


def _difference(own: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return how a model differs from a teacher apart from corrections; empty if it does not."""
    parts = [
        f"{name} is {own.get(name)!r} and the teacher's {wanted.get(name)!r}"
        for name in dict.fromkeys([*own, *wanted])
        if own.get(name) != wanted.get(name)
    ]
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return ", ".join(parts[:3]) + more


def _comparable(config: ModelConfig, provenance: Mapping[str, Any]) -> dict[str, Any]:
    # Each method may have its own best learning rate, and only corrections have two stages.
    free = ("iterate_from_fraction", "iterate_ramp_fraction", "learning_rate", *NON_KEY_FIELDS)
    # A checkpoint from before a setting existed was made as its default makes one.
    recipe = {**TrainingSettings().model_dump(mode="json"), **provenance.get("recipe", {})}
    of_method = ("method", "method_options", "schedule")
    shape = {name: value for name, value in config.to_dict().items() if name not in of_method}
    return {
        **{f"model.{name}": value for name, value in shape.items()},
        "tokens": provenance.get("tokens"),
        **{f"training.{name}": value for name, value in recipe.items() if name not in free},
    }
