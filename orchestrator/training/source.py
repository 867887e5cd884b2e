"""The source of a training: the model whose weights it starts from (`training.source`).

In: what a user names, and settings. Out: the source, settings that follow it, and the model that is
trained. Sizes, attention, tokenizer and context come from the source; method, schedule and recipe
from the settings, some of whose defaults are others with a source. Nothing is loaded or written.
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
"""Peak learning rate for a source whose own recipe is not known."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model whose weights a training starts from."""

    folder: Path
    """The model's checkpoint, which a training may have to make first; of a model that is not
    imported yet, its folder."""
    config: ModelConfig
    learning_rate: float | None
    """Peak rate of the training that made the model; None of a model from elsewhere."""

    @property
    def is_checkpoint(self) -> bool:
        """Whether it can be trained from; a model from elsewhere is imported first, and that of
        another training is trained."""
        return is_checkpoint(self.folder) and self.folder.is_dir()

    @property
    def tokenizer(self) -> Path | None:
        """The model's `tokenizer.json`, if there is one."""
        path = self.folder / TOKENIZER_NAME
        return path if path.is_file() else None

    def model(self, settings: ModelSettings) -> ModelConfig:
        """Return the model that is trained: the source's sizes, the settings' method and schedule.

        Raises:
            UserError: If the settings name another shape, or the method's options or the schedule
                do not fit.
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
                        f"{name} of shape {shape}, for which the model then has no place; leave "
                        "them out, to take those of the source"
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
    """Return the source that a user names: a run, a trial, a checkpoint, a model folder, `hub:`.

    Raises:
        UserError: If there is no such model, it is damaged, or a decoder cannot run it.
    """
    # A folder with a config.json alone has a plan; its import, before a run, asks for weights.
    model = open_model(name, workspace, needs_weights=False)
    if model.config is None:
        raise UserError(model.why_no_decoder)
    if model.is_external:
        return Source(folder=model.path, config=model.config, learning_rate=None)
    return Source(
        folder=model.path,
        # A trial may be measured under another schedule than its checkpoint's own.
        config=load_config(model.path),
        learning_rate=stored_recipe(model.path).get("learning_rate"),
    )


def source_of_run(job: TrainingJob) -> Source:
    """Return the model that a pretraining makes, as a source; it may not be trained yet."""
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
    """Return settings with the source's tokenizer and the defaults of a training from it.

    Args:
        prepared: Folder of the tokens of these settings, if they are prepared. Tokens that the
            source reads stay as they are.

    Returns:
        The settings; and the defaults that are others than without a source, by setting.

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
    # Published models have contexts of many thousand tokens, a step on a CPU has fewer.
    if recipe.sequence_length is None and recipe.num_tokens_per_step < source.config.context_length:
        defaults["training.sequence_length"] = recipe.num_tokens_per_step
    changes = {name.removeprefix("training."): value for name, value in defaults.items()}
    has_text = data.source in TEXT_SOURCES or any(name in TEXT_SOURCES for name in data.shares)
    reads_text = has_text or data.has_words
    has_symbols = any(name not in TEXT_SOURCES for name in data.shares) and not data.has_words
    trains_tokenizer = data.tokenizer == "train" and reads_text
    is_prepared = prepared is not None and _has_tokenizer(source, prepared / TOKENIZER_NAME)
    # A mixture adds the symbols of its tasks to a tokenizer. A source that was trained on such a
    # mixture has them in its tokenizer already, which could not get them again.
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
    """Check that text is tokenized as the source reads it.

    Args:
        other: The `tokenizer.json` of the text.
        shown: The value of `data.tokenizer`, for the message.

    Raises:
        UserError: If the source has another tokenizer.
    """
    if not _has_tokenizer(source, other):
        raise UserError(
            f"data.tokenizer={shown}: the tokens of {other.parent} have another tokenizer than "
            f"the source {source.folder}; leave it out, and take data of the source's kind"
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
