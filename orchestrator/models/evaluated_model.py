"""The model that is evaluated or benchmarked: a checkpoint, or a model folder from elsewhere.

Checkpoints, and folders that a decoder can read (an exported model, the published naming, a plain
Llama), are scored as a decoder. transformers runs any other architecture: it can be evaluated, but
has no iteration schedule and no cost model here.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.schedule import IterationSchedule
from orchestrator.models.folder import load_config, text_files_key, tokenizer_file, weights_key
from orchestrator.models.hub_models import shown_path
from orchestrator.models.loading import (
    CHECKPOINT,
    decoder_config,
    folder_kind,
    load_model,
    read_config,
)
from orchestrator.models.lookup import find_model_folder, resolve_checkpoint, resolve_model
from orchestrator.models.model_tokenizer import (
    FolderTokenizer,
    ModelTokenizer,
    checkpoint_tokenizer,
)
from orchestrator.terminal.render import shortest_schedule
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import resolve_path
from orchestrator.workspace.layout import Workspace
from orchestrator.workspace.provenance import content_key, file_key

_MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model on disk, under one iteration schedule."""

    path: Path
    name: str
    key: tuple[Any, ...]
    """All that its scores depend on, as JSON values: weights, configuration, tokenizer."""
    config: ModelConfig | None
    """Sizes, method and schedule; None if transformers runs the model."""
    architecture: str
    """The method's registry key, or transformers' name of the architecture."""
    context_length: int
    """Largest number of tokens that it reads."""
    is_external: bool
    """Whether it is a model folder from elsewhere, not a checkpoint of this project."""
    text_folder: Path
    """Folder of its tokenizer."""

    def tokenizer(self, *, trust_remote_code: bool = False) -> ModelTokenizer:
        """Load its tokenizer.

        Raises:
            UserError: If it has none, or one that cannot be used.
        """
        if self.is_external:
            return FolderTokenizer(self.text_folder, trust_remote_code=trust_remote_code)
        return checkpoint_tokenizer(self.text_folder)

    def decoder(self, dtype: torch.dtype = torch.float32, *, device: str = "cpu") -> Decoder:
        """Load the model with weights of this dtype.

        Raises:
            UserError: If only transformers can run it, or its weights are missing or damaged.
        """
        if self.config is None:
            raise UserError(
                f"{self.path} is a {self.architecture} model; only IIET, PCformer and Llama models "
                "can be loaded as a decoder"
            )
        return load_model(self.path, device=device, dtype=dtype, schedule=self.config.corrections)


def open_model(
    path: Path,
    schedule: str | IterationSchedule | None = None,
    *,
    warn: Callable[[str], None] | None = None,
    text_folder: Path | None = None,
) -> EvaluatedModel:
    """Return the model at a path.

    Args:
        path: A checkpoint, a run (its newest checkpoint), or a model folder from elsewhere.
        schedule: Iteration schedule to use instead of the model's own.
        warn: Called if a run's newest checkpoint is damaged and an older one is used; without it,
            the damage is an error.
        text_folder: Checkpoint whose tokenizer reads text for a checkpoint; its own when unset.

    Raises:
        UserError: If there is no model, it is damaged, or the schedule does not fit it.
    """
    path = resolve_path(path)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}; a model is a checkpoint, a run or its folder")
    if _is_external(path):
        return _open_external(path, schedule)
    checkpoint = resolve_checkpoint(path, warn)
    config = _with_schedule(load_config(checkpoint), schedule, checkpoint)
    text_folder = text_folder or checkpoint
    text = text_files_key(text_folder)
    key = (
        weights_key(checkpoint),
        config.to_dict(),
        file_key(tokenizer_file(text_folder)),
        *([text] if text else []),
    )
    return EvaluatedModel(
        path=checkpoint,
        name=_named(checkpoint.parent.name, config, schedule),
        key=key,
        config=config,
        architecture=config.method,
        context_length=config.context_length,
        is_external=False,
        text_folder=text_folder,
    )


def open_models(
    workspace: Workspace,
    paths: Sequence[Path] | None,
    schedules: Sequence[str] | None,
    *,
    warn: Callable[[str], None] | None = None,
) -> list[EvaluatedModel]:
    """Return the models that a user named, each under each of the schedules.

    Args:
        paths: Checkpoints, runs, their names, or model folders; if empty, the newest model.
        schedules: Iteration schedules; if empty, each model's own.
        warn: As in `open_model`.

    Raises:
        UserError: If one is missing or damaged, or a schedule does not fit it.
    """
    wanted: Sequence[str | None] = schedules or [None]
    if paths:
        folders = [find_model_folder(workspace, path, model_folders=True) for path in paths]
    else:
        folders = [resolve_model(workspace, None, warn)]
    return [open_model(folder, schedule, warn=warn) for folder in folders for schedule in wanted]


def _is_external(folder: Path) -> bool:
    try:
        return folder_kind(folder) != CHECKPOINT
    except UserError:
        return False  # A run, or a damaged checkpoint; `resolve_checkpoint` reports it.


def _open_external(path: Path, schedule: str | IterationSchedule | None) -> EvaluatedModel:
    values, config = read_config(path), decoder_config(path)
    architecture = str(values.get("model_type") or "unknown")
    if config is not None:
        config = _with_schedule(config, schedule, path)
    elif schedule is not None:
        raise UserError(f"{path} is a {architecture} model, which has no iteration schedule")
    # Hashing reads all files once, which takes less time than loading the weights.
    templates = path.glob("additional_chat_templates/*.jinja")
    files = [f for f in path.iterdir() if f.suffix in _MODEL_FILES and f.is_file()]
    files = sorted([*files, *templates])
    digests = content_key([(file.name, file_key(file)) for file in files])
    how = "transformers" if config is None else config.to_dict()
    length = values.get("max_position_embeddings") or values.get("n_positions") or 2048
    return EvaluatedModel(
        path=path,
        name=_named(shown_path(path).name, config, schedule),
        key=(digests, how),
        config=config,
        architecture=architecture if config is None else config.method,
        context_length=config.context_length if config else int(length),
        is_external=True,
        text_folder=path,
    )


def _with_schedule(
    config: ModelConfig, schedule: str | IterationSchedule | None, path: Path
) -> ModelConfig:
    if schedule is None:
        return config
    try:
        if isinstance(schedule, str):
            schedule = IterationSchedule.parse(schedule, num_layers=config.num_layers)
        return dataclasses.replace(config, schedule=schedule)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _named(name: str, config: ModelConfig | None, schedule: str | IterationSchedule | None) -> str:
    if schedule is None or config is None:
        return name
    return f"{name} r={shortest_schedule(tuple(config.corrections))}"


def short_names(models: Sequence[EvaluatedModel]) -> list[str]:
    """Return a unique label for each model.

    For one model under several schedules, the labels are the schedules. Otherwise they are names;
    equal names get the checkpoint, then parent folders, and finally a number.
    """
    schedules = [model.config.corrections for model in models if model.config]
    is_one_model = len({model.path for model in models}) == 1
    if len(models) > 1 and is_one_model and len(set(schedules)) == len(models):
        return [f"r={shortest_schedule(tuple(schedule))}" for schedule in schedules]
    label_of = _labels(models)
    labels: list[str] = []
    for model in models:
        label = label_of[model.path, model.name]
        numbered, number = label, 1
        while numbered in labels:  # The same model was given twice.
            number += 1
            numbered = f"{label} ({number})"
        labels.append(numbered)
    return labels


def _labels(models: Sequence[EvaluatedModel]) -> dict[tuple[Path, str], str]:
    """Return a label for each path and name, with as many parent folders as make it unique."""
    labels = {(model.path, model.name): model.name for model in models}
    longest = max((len(path.parts) for path, _ in labels), default=0)
    for num_parts in range(2, longest + 1):
        counts = Counter(labels.values())
        for model in models:
            path = model.path
            if counts[labels[path, model.name]] > 1:
                shown = shown_path(path)
                folder = shown.name if model.is_external else path.parent.name
                schedule = model.name.removeprefix(folder)
                labels[path, model.name] = "/".join(shown.parts[-num_parts:]) + schedule
    return labels
