"""The source model of a training, whose weights it starts from (`training.source`).

In: what a user names, and settings. Out: the source model, settings adapted to it, and the model
that is trained. Sizes, attention, tokenizer and context come from the source model; method,
schedule and recipe from the settings, some of which then have other defaults. Nothing is loaded or
written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from iiet.model.config import PRESETS, ModelConfig
from iiet.model.facts import facts_of
from iiet.model.schedule import IterationSchedule
from orchestrator.data.store import TOKENIZER_NAME
from orchestrator.models.folder import is_checkpoint, load_config, stored_recipe
from orchestrator.models.hub import is_hub_name
from orchestrator.models.open import open_model
from orchestrator.models.tokenizer import load_tokenizer, tokenizer_path
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ModelSettings, Settings
from orchestrator.settings.data import TEXT_SOURCES
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, checkpoint_name

IMPORTED_LEARNING_RATE: Final = 5e-5
"""Peak learning rate for a source model whose own recipe is not known."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source model."""

    folder: Path
    """The model's checkpoint, which may have to be trained first; before an import, its folder."""
    config: ModelConfig
    learning_rate: float | None
    """Peak learning rate of the model's own training; None if it was trained elsewhere."""

    @property
    def is_checkpoint(self) -> bool:
        """Whether a training can start from it now: it is imported, and its own training
        finished."""
        return is_checkpoint(self.folder) and self.folder.is_dir()

    @property
    def tokenizer(self) -> Path | None:
        """The model's `tokenizer.json`, if there is one."""
        path = self.folder / TOKENIZER_NAME
        return path if path.is_file() else None

    def model(self, settings: ModelSettings) -> ModelConfig:
        """Return the model to train: sizes of the source model, method and schedule of the
        settings.

        Raises:
            UserError: If the settings name other sizes, or the method's options or the schedule do
                not fit.
        """
        self._check_sizes(settings)
        config = self.config
        method = settings.method
        options = settings.method_options
        has_corrections = facts_of(method).has_corrections
        schedule = settings.corrections if has_corrections else 0
        method_options: Any = None
        if method == config.method and not options:
            method_options = config.method_options
        try:
            if options:
                values = {**config.to_dict(), "method": method, "method_options": options}
                values["schedule"] = list(_parsed(schedule, config))
                model = ModelConfig.from_dict(values)
            else:
                model = replace(
                    config,
                    method=method,
                    schedule=_parsed(schedule, config),
                    method_options=method_options,
                )
        except ValueError as error:
            raise UserError(f"model: {error}") from None
        if method == config.method:
            shapes = _method_shapes(model)
            for name, shape in _method_shapes(config).items():
                if shapes.get(name) != shape:
                    raise UserError(
                        f"model.method_options={options}: the source {self.folder} has a weight "
                        f"{name} of shape {shape}, which the model would lack; leave the options "
                        "out, to take those of the source"
                    )
        return model

    def _check_sizes(self, settings: ModelSettings) -> None:
        not_sizes = {"preset", "method", "corrections", "method_options"}
        sizes = settings.model_dump(exclude=not_sizes, exclude_none=True)
        for name, value in sizes.items():
            source_value = self.config.to_dict().get(name, getattr(self.config, name))
            if isinstance(source_value, tuple):
                source_value = list(source_value)
            if value != source_value:
                raise UserError(
                    f"model.{name}={value}: sizes come from the source, and {self.folder} has "
                    f"{source_value}; leave it out"
                )
        if "preset" not in settings.model_fields_set:
            return
        for name, value in PRESETS.get(settings.preset, {}).items():
            source_value = getattr(self.config, name)
            if name in ("vocab_size", "context_length", *sizes):
                continue
            if value != source_value:
                raise UserError(
                    f"model.preset={settings.preset}: sizes come from the source, and "
                    f"{self.folder} has {name}={source_value}, not {value}; leave it out"
                )


def find_source(workspace: Workspace, name: str) -> Source:
    """Return the source model that a user names: a run, trial, checkpoint, model folder or `hub:`.

    Raises:
        UserError: If there is no such model, it is damaged, or a decoder cannot run it.
    """
    # A plan needs only config.json; the import, before a run, also needs the weights.
    model = open_model(name, workspace, needs_weights=False)
    if model.config is None:
        raise UserError(model.why_no_decoder)
    if model.is_external:
        return Source(folder=model.path, config=model.config, learning_rate=None)
    return Source(
        folder=model.path,
        # A trial's schedule may differ from that of its checkpoint.
        config=load_config(model.path),
        learning_rate=stored_recipe(model.path).get("learning_rate"),
    )


def source_of_run(job: TrainingJob) -> Source:
    """Return the model of a pretraining as a source model; it may not be trained yet."""
    return Source(
        folder=job.folder / checkpoint_name(job.recipe.num_steps),
        config=job.model,
        learning_rate=job.recipe.learning_rate,
    )


def with_source(settings: Settings, source: Path | str | None) -> Settings:
    """Return the settings with another `training.source`; None for random weights."""
    recipe = settings.training.model_copy(
        update={"source": None if source is None else str(source)}
    )
    return settings.model_copy(update={"training": recipe})


def follow_source(
    settings: Settings, source: Source, prepared: Path | None
) -> tuple[Settings, dict[str, Any]]:
    """Return settings with the source model's tokenizer and the defaults of a training from it.

    Args:
        prepared: Folder of the prepared tokens of these settings, if they exist. They are kept if
            the source model has their tokenizer.

    Returns:
        The settings; and setting -> default, where a source model changes the default.

    Raises:
        UserError: If the settings name another tokenizer.
    """
    defaults: dict[str, Any] = {}
    recipe = settings.training
    data = settings.data
    rate = source.learning_rate or IMPORTED_LEARNING_RATE
    if "learning_rate" not in recipe.model_fields_set and rate != recipe.learning_rate:
        defaults["training.learning_rate"] = rate
    has_corrections = facts_of(settings.model.method).has_corrections
    if has_corrections and "iterate_from_fraction" not in recipe.model_fields_set:
        defaults["training.iterate_from_fraction"] = 0.0
    # Published models have contexts of many thousand tokens; a step on a CPU has fewer.
    if recipe.sequence_length is None and recipe.num_tokens_per_step < source.config.context_length:
        defaults["training.sequence_length"] = recipe.num_tokens_per_step
    changes = {name.removeprefix("training."): value for name, value in defaults.items()}
    has_text = data.source in TEXT_SOURCES or any(name in TEXT_SOURCES for name in data.shares)
    reads_text = has_text or data.has_words
    has_symbols = any(name not in TEXT_SOURCES for name in data.shares) and not data.has_words
    trains_tokenizer = data.tokenizer == "train" and reads_text
    is_prepared = prepared is not None and _has_tokenizer(source, prepared / TOKENIZER_NAME)
    # A mixture adds the symbols of its tasks to a tokenizer. If the source model was trained on
    # such a mixture, its tokenizer already has them.
    if source.tokenizer and trains_tokenizer and not has_symbols and not is_prepared:
        defaults["data.tokenizer"] = str(source.tokenizer)
        data = data.model_copy(update={"tokenizer": str(source.tokenizer)})
    elif reads_text and data.tokenizer != "train" and not is_hub_name(data.tokenizer):
        check_tokenizer(source, tokenizer_path(data.tokenizer), data.tokenizer)
    settings = settings.model_copy(
        update={"training": recipe.model_copy(update=changes), "data": data}
    )
    return settings, defaults


def check_tokenizer(source: Source, other: Path, shown: str) -> None:
    """Check that text has the source model's tokenizer.

    Args:
        other: The `tokenizer.json` of the text.
        shown: The value of `data.tokenizer`, for the message.

    Raises:
        UserError: If the source model has another tokenizer.
    """
    if not _has_tokenizer(source, other):
        raise UserError(
            f"data.tokenizer={shown}: the tokens of {other.parent} have another tokenizer than "
            f"the source {source.folder}; leave it out, or choose data that fit the source"
        )


def _has_tokenizer(source: Source, file: Path) -> bool:
    if source.tokenizer is None:
        return True
    return load_tokenizer(file).to_str() == load_tokenizer(source.tokenizer).to_str()


def _parsed(schedule: Any, config: ModelConfig) -> IterationSchedule:
    return IterationSchedule.parse(schedule, num_layers=config.num_layers)


def _method_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that the method adds, by name."""
    import torch

    from iiet.backbone import Backbone

    with torch.device("meta"):
        backbone = Backbone(config)
    return {name: tuple(p.shape) for name, p in backbone.method_parameters().items()}
