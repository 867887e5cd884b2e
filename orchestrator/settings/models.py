"""The sections that say what a model is made of: its data and its shape."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from iiet.methods import METHODS
from orchestrator.settings.section import Section

DEFAULT_METHOD, BASELINE_METHOD = "iiet", "vanilla"
"""What models and teachers are, and what they are compared with, where settings say nothing."""
MAX_VOCAB_SIZE = 1_000_000
"""The tokenizers library takes the memory for all entries at once, and ends the process if there is
none."""
MAX_LAYERS = 1000
"""A number beyond this is a slip of the keyboard, and would only fill the memory."""


class DataSettings(Section):
    """What is read, how it is tokenized, and what is held out."""

    source: Literal["python", "files", "hub"] = "python"
    """`python`: the English that every Python carries; `files`: `files` below; `hub`: a `datasets`
    name."""
    files: tuple[str, ...] = ()
    """Paths or glob patterns of `.txt`, `.jsonl` (also `.jsonl.gz`) or `.parquet` files; a folder
    stands for all of these in it and below it."""
    hub_name: str = ""
    """Name of a data set on the hub, for `source: hub`, such as `cerebras/SlimPajama-627B`, or a
    folder that the `datasets` library can read."""
    hub_config: str | None = None
    """Configuration of the hub's data set, if it has several."""
    text_field: str = "text"
    """Field that holds the text in JSON lines, Parquet and hub data sets."""
    max_documents: int | None = Field(default=None, gt=0)
    """Read at most this many documents; no limit when unset."""
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the documents held out for validation and tasks, chosen by content hash."""
    tokenizer: str = "train"
    """`train` a byte-level BPE, or the path of a `tokenizer.json`, or `hub:NAME`."""
    vocab_size: int = Field(default=2048, ge=258, le=MAX_VOCAB_SIZE)
    """Entries of a trained tokenizer."""

    @field_validator("files")
    @classmethod
    def _files_are_read(cls, files: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        source = info.data.get("source", "files")
        if files and source != "files":
            raise PydanticCustomError(
                "not_read",
                "data.source is {source}, which does not read them; set data.source=files, or "
                "leave data.files out",
                {"source": source},
            )
        return files


class ModelSettings(Section):
    """The model's shape: a preset, and what differs from it."""

    preset: str = "tiny"
    """Name of a preset: tiny, 55m, 340m, 740m, 1.3b."""
    method: str = DEFAULT_METHOD
    """How a layer advances the hidden state: iiet, vanilla, pcformer, or another known method."""
    corrections: int | str | tuple[int, ...] = 2
    """Corrections per layer (the iteration schedule): `3`, or one number a layer, `2,2,1,1,1,1`;
    of a method that makes corrections, such as iiet."""
    method_options: dict[str, Any] = Field(default={})
    """Options of the method where they differ from its defaults, by name, such as `damping` of
    iiet. Models of other methods that a sweep trains beside it have their defaults."""
    dim: int | None = Field(default=None, gt=0)
    """Width of the hidden state; the preset's when unset, like all that follow."""
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


def model_label(method: str, corrections: object) -> str:
    """Return what tables call a model: its method, or its corrections, where it makes some.

    Args:
        method: Its method.
        corrections: Of a method that makes them, as the settings write them.

    Returns:
        `vanilla`; `r = 3` of the usual method, `other, r = 3` of another one.
    """
    if not METHODS[method].has_corrections:
        return method
    return f"r = {corrections}" if method == DEFAULT_METHOD else f"{method}, r = {corrections}"


def method_of_label(label: str) -> str:
    """Return the method of a label, or of a method's own name."""
    return DEFAULT_METHOD if label.startswith("r = ") else label.split(", r = ")[0]
