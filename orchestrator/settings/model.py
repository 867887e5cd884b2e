"""Settings of the data and of the model's shape; labels of models."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from iiet.config import PRESETS, ModelConfig
from iiet.methods import METHODS
from orchestrator.settings.choices import OneOf
from orchestrator.settings.depth import DepthSettings
from orchestrator.settings.mixture import OTHER_SOURCES, TEXT_SOURCES, check_shares, source_order
from orchestrator.settings.section import Section
from orchestrator.terminal.render import format_count

DEFAULT_METHOD = "iiet"
BASELINE_METHOD = "vanilla"
MAX_VOCAB_SIZE = 1_000_000
"""The tokenizers library allocates all entries at once, and aborts the process if that fails."""
MAX_LAYERS = 1000
"""A larger number is a typing error and would only fill the memory."""


class DataSettings(Section):
    """Corpus, tokenizer and held-out documents."""

    source: Annotated[str, OneOf(TEXT_SOURCES, also=OTHER_SOURCES)] = "python"
    """`python`: the English texts that come with every Python; `files`: `files` below; `hub`: the
    data set `hub_name`; `depth`: the generated tasks in `depth` below; `mixture`: several of these
    at the `shares` below; or a source of another package."""
    shares: dict[str, float] = Field(default={})
    """For `source: mixture`: the share of the training sequences that each source gives, such as
    `{python: 0.8, phop_6: 0.2}`. Names are `python`, `files`, `hub`, those of other packages, and
    depth tasks. Shares sum to 1 and are rounded to thousandths."""
    source_options: dict[str, dict[str, Any]] = Field(default={})
    """Options of sources of other packages, by their names: `{name: {option: value}}`."""
    files: tuple[str, ...] = ()
    """Paths or glob patterns of `.txt`, `.jsonl` (also `.jsonl.gz`, `.jsonl.zst`) or `.parquet`
    files; a folder means all such files in it and below it."""
    hub_name: str = ""
    """For `source: hub`: name of a data set on the hub, such as `cerebras/SlimPajama-627B`, or a
    folder that the `datasets` library can read."""
    hub_config: str | None = None
    """Configuration of the hub's data set, if it has several."""
    text_field: str = "text"
    """Field that holds the text in JSON lines, Parquet and hub data sets."""
    max_documents: int | None = Field(default=None, gt=0)
    """Read at most this many documents (default: all)."""
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the documents held out for validation and tasks, chosen by content hash."""
    tokenizer: str = "train"
    """`train` a byte-level BPE, or the path of a `tokenizer.json`, or `hub:NAME`."""
    vocab_size: int = Field(default=2048, ge=258, le=MAX_VOCAB_SIZE)
    """Entries of a trained tokenizer."""
    depth: DepthSettings = DepthSettings()
    """Generated tasks of known depth."""

    @field_validator("shares")
    @classmethod
    def _refuse_bad_shares(cls, shares: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        source = info.data.get("source", "mixture")
        if shares and source != "mixture":
            raise ValueError(
                f"data.source is {source}, which is one source; set data.source=mixture, or leave "
                "data.shares out"
            )
        if not shares and source == "mixture" and "source" in info.data:
            raise ValueError(
                "data.source is mixture, but no source has a share; give some, such as "
                "--set 'data.shares={python: 0.8, phop_6: 0.2}'"
            )
        check_shares(shares)
        return shares

    @field_validator("source_options")
    @classmethod
    def _refuse_options_of_other_sources(
        cls, options: dict[str, dict[str, Any]], info: ValidationInfo
    ) -> dict[str, dict[str, Any]]:
        source, shares = info.data.get("source"), info.data.get("shares")
        if source is None or shares is None:  # One of them is wrong, which is reported.
            return options
        read = shares if source == "mixture" else (source,)
        if unread := [name for name in options if name not in read]:
            raise ValueError(
                f"{', '.join(unread)} is not read; data.source is {source}"
                + (f" of {', '.join(shares)}" if source == "mixture" else "")
            )
        return options

    @field_validator("files")
    @classmethod
    def _refuse_files_of_another_source(
        cls, files: tuple[str, ...], info: ValidationInfo
    ) -> tuple[str, ...]:
        source = info.data.get("source", "files")
        if not files or source == "files":
            return files
        if source != "mixture":
            raise ValueError(
                f"data.source is {source}, which does not read them; set data.source=files, or "
                "leave data.files out"
            )
        if "files" not in info.data.get("shares", ["files"]):
            raise ValueError("data.shares has no `files`; give them a share, or leave them out")
        return files

    @field_validator("depth")
    @classmethod
    def _refuse_tasks_of_another_source(
        cls, depth: DepthSettings, info: ValidationInfo
    ) -> DepthSettings:
        source = info.data.get("source", "depth")
        if depth.tasks and source == "mixture":
            raise ValueError(
                "the tasks of a mixture are those in data.shares; leave data.depth.tasks out"
            )
        if depth.tasks and source != "depth":
            raise ValueError(
                f"data.source is {source}, which does not generate tasks; set data.source=depth, "
                "or leave data.depth.tasks out"
            )
        return depth

    @property
    def texts(self) -> dict[str, DataSettings]:
        """The text sources of a mixture, each with the settings that it would have alone."""
        no_hub: dict[str, object] = {"hub_name": "", "hub_config": None}
        unread: dict[str, dict[str, object]] = {
            "python": {"files": (), **no_hub},
            "files": no_hub,
            "hub": {"files": ()},
        }
        alone = {"shares": {}, "depth": DepthSettings()}
        options = self.source_options
        return {
            name: self.model_copy(
                update={
                    "source": name,
                    "source_options": {name: options[name]} if name in options else {},
                    **alone,
                    **unread.get(name, {"files": (), **no_hub}),
                }
            )
            for name in source_order(self.shares)
            if name in TEXT_SOURCES
        }

    @property
    def tasks(self) -> DepthSettings:
        """The depth tasks of a mixture, with their options."""
        names = (name for name in source_order(self.shares) if name not in TEXT_SOURCES)
        return self.depth.model_copy(update={"tasks": tuple(names)})

    def read_by_source(self) -> dict[str, Any]:
        """Return the settings that the source reads, as JSON values, for keys and manifests."""
        unread = {"mixture": set(), "depth": {"shares"}}.get(self.source, {"shares", "depth"})
        if not self.source_options:  # Keys of earlier versions have none.
            unread = unread | {"source_options"}
        return self.model_dump(mode="json", exclude=unread)


class ModelSettings(Section):
    """Shape of the model: a preset, and what differs from it."""

    preset: str = "tiny"
    """Name of a preset: tiny, 55m, 340m, 740m, 1.3b."""
    method: Annotated[str, OneOf(METHODS)] = DEFAULT_METHOD
    """How a layer advances the hidden state: iiet, vanilla, pcformer, looped, or another method."""
    corrections: int | str | tuple[int, ...] = 2
    """Corrections per layer (the iteration schedule): `3`, or one number per layer, `2,2,1,1,1,1`.
    Only methods with corrections, such as iiet, read it; looped takes one number, and repeats the
    stack of layers that often."""
    method_options: dict[str, Any] = Field(default={})
    """Options of the method by name, such as `damping` of iiet (default: the method's defaults).
    Models of other methods in the same sweep use their defaults."""
    dim: int | None = Field(default=None, gt=0)
    """Width of the hidden state (default here and below: the preset's)."""
    num_layers: int | None = Field(default=None, gt=0, le=MAX_LAYERS)
    """Number of layers."""
    num_heads: int | None = Field(default=None, gt=0)
    """Query heads."""
    num_kv_heads: int | None = Field(default=None, gt=0)
    """Key and value heads."""
    ffn_dim: int | None = Field(default=None, gt=0)
    """Width of the feed-forward layer."""
    context_length: int | None = Field(default=None, gt=1)
    """Longest sequence in tokens; also the length of the training sequences."""
    tie_embeddings: bool | None = None
    """Whether the output head shares the embedding's weights."""

    @property
    def own_or_preset_layers(self) -> int | None:
        """Number of layers, the preset's if none is set; None if there is no such preset."""
        return self.num_layers or PRESETS.get(self.preset, {}).get("num_layers")


def model_label(method: str, corrections: object, num_layers: int | None = None) -> str:
    """Return the name of a model in tables.

    `vanilla` for a method without corrections, `r = 3` for the default method, else `other, r = 3`;
    with a number of layers `vanilla, 8 layers`.
    """
    parts = [method] if method != DEFAULT_METHOD else []
    if METHODS[method].has_corrections:
        parts.append(f"r = {corrections}")
    if num_layers is not None:
        parts.append(format_count(num_layers, "layer"))
    return ", ".join(parts)


def model_family(config: ModelConfig) -> str:
    """Return method and size: `iiet-tiny` for a preset's layers, else `iiet-2x64`, layers x width.

    Vocabulary and context length, which follow the data, are not part of it.
    """
    sizes = ("num_layers", "dim", "ffn_dim", "num_heads")
    own = [getattr(config, name) for name in sizes]
    presets = [name for name, preset in PRESETS.items() if [preset[s] for s in sizes] == own]
    size = presets[0] if presets else f"{config.num_layers}x{config.dim}"
    return f"{config.method}-{size}"
