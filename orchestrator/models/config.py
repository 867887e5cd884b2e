"""Build a `ModelConfig` from the `model` section of the settings and the size of the vocabulary,
and name the family of a model."""

from __future__ import annotations

from iiet.config import PRESETS, ModelConfig, preset
from iiet.facts import facts_of
from iiet.schedule import IterationSchedule
from orchestrator.settings import ModelSettings
from orchestrator.workspace.errors import UserError

_SIZES = (
    "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "context_length", "tie_embeddings",
)  # fmt: skip


def build_model_config(
    model: ModelSettings, *, vocab_size: int, context_length: int | None = None
) -> ModelConfig:
    """Return the model configuration of the settings for a tokenizer of `vocab_size` entries.

    Args:
        context_length: Length of the data's sequences, where they have one; the model gets it
            unless its settings name another.

    Raises:
        UserError: If the preset is unknown, or the sizes do not fit together.
    """
    if model.preset not in PRESETS:
        raise UserError(f"model.preset: {model.preset!r} is unknown; known: {', '.join(PRESETS)}")
    sizes = {name: getattr(model, name) for name in _SIZES if getattr(model, name) is not None}
    if context_length is not None:
        sizes.setdefault("context_length", context_length)
    if "num_heads" in sizes:
        sizes.setdefault("num_kv_heads", sizes["num_heads"])
    num_layers: int = sizes.get("num_layers", PRESETS[model.preset]["num_layers"])
    try:
        schedule = (
            IterationSchedule.parse(model.corrections, num_layers=num_layers)
            if facts_of(model.method).has_corrections
            else IterationSchedule.none(num_layers)
        )
        return preset(
            model.preset,
            method=model.method,
            method_options=model.method_options or None,
            vocab_size=vocab_size,
            schedule=schedule,
            **sizes,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def model_family(config: ModelConfig) -> str:
    """Return method and size: `iiet-tiny` for a preset's layers, else `iiet-2x64`, layers x width.

    Vocabulary and context length, which follow the data, are not part of it.
    """
    sizes = ("num_layers", "dim", "ffn_dim", "num_heads")
    own = [getattr(config, name) for name in sizes]
    presets = [name for name, preset in PRESETS.items() if [preset[s] for s in sizes] == own]
    size = presets[0] if presets else f"{config.num_layers}x{config.dim}"
    return f"{config.method}-{size}"
