"""Labels of models for people: in tables, pages, MLflow runs and model cards.

A model on disk has the name of its run or folder, and its schedule or depth if that is not its own.
A model that a sweep trains is named by method and corrections.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iiet.model.facts import facts_of
from orchestrator.settings import DEFAULT_METHOD
from orchestrator.terminal.render import format_count
from orchestrator.workspace.layout import CHECKPOINT_NAME

# Models on disk


def model_name(folder: Path) -> str:
    """Return the name of a checkpoint's run, of a model of the hub, or of any other folder."""
    if CHECKPOINT_NAME.fullmatch(folder.name):
        return folder.parent.name
    return name_with_owner(folder).rpartition("/")[2]


def name_with_owner(folder: Path) -> str:
    """Return a folder's name; `OWNER/NAME` for one in the hub's cache, whose own name is a hash."""
    repository = folder.parent.parent.name  # models--OWNER--NAME/snapshots/HASH
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return "/".join(repository.split("--")[1:])
    return folder.name


def model_label(folder: Path, schedule_label: str = "") -> str:
    """Return the label of a model, such as `teacher` or `teacher r=2,1`.

    Args:
        schedule_label: Its schedule or depth as text, if that is not the model's own.
    """
    return f"{model_name(folder)} {schedule_label}".rstrip()


def unique_labels(models: Sequence[tuple[Path, str]]) -> list[str]:
    """Return the labels of models that are shown together.

    Different models with the same label get the checkpoint, the parent folder or the owner on the
    hub added; a model that is listed several times gets a number.

    Args:
        models: The arguments of `model_label` for each model.
    """
    labels: list[str] = []
    for folder, schedule_label in models:
        label = model_label(folder, schedule_label)
        if any(model_label(*other) == label and other[0] != folder for other in models):
            longer_name = name_with_owner(folder)
            if "/" not in longer_name:
                longer_name = "/".join(folder.parts[-2:])
            label = f"{longer_name} {schedule_label}".rstrip()
        labels.append(label)
    unique: list[str] = []
    for number, label in enumerate(labels):
        num_before = labels[:number].count(label)
        unique.append(f"{label} ({num_before + 1})" if num_before else label)
    return unique


# Models of a sweep


def trained_label(method: str, corrections: object, num_layers: int | None = None) -> str:
    """Return the label of a model that is trained: `vanilla`, `r = 3` for the default method, else
    `other, r = 3`, below its full level `pcformer, level 0`; with a number of layers `vanilla, 8
    layers`.
    """
    parts = [method] if method != DEFAULT_METHOD else []
    if isinstance(corrections, tuple):
        corrections = ",".join(map(str, corrections))
    facts = facts_of(method)
    if facts.full_level is not None:
        if corrections not in (None, facts.full_level):
            parts.append(f"level {corrections}")
    elif facts.has_corrections:
        parts.append(f"r = {corrections}")
    if num_layers is not None:
        parts.append(format_count(num_layers, "layer"))
    return ", ".join(parts)


def seed_label(group: str, seed: int) -> str:
    """Return the label of one seed of a model."""
    return f"{group}, seed {seed}"


def group_of(label: str, seed: int) -> str | None:
    """Return the label of a model without its seed; None if the label does not name the seed."""
    ending = seed_label("", seed)
    return label.removesuffix(ending) if label.endswith(ending) else None
