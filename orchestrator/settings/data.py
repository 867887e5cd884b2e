"""Settings of the data: corpus, tokenizer, mixtures, and generated tasks of known depth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, field_validator

from orchestrator.settings.section import MAX_COUNT, Section
from orchestrator.workspace.errors import quoted

TASK_KINDS = ("phop", "chain", "lookup", "s5")
MAX_SYMBOLS = 10_000
MAX_VOCAB_SIZE = 1_000_000
"""The tokenizers library allocates all entries at once, and aborts the process if that fails."""
_TASK_NAME = re.compile(rf"({'|'.join(TASK_KINDS)})_([0-9]+)")


def is_depth_task(name: str) -> bool:
    """Return whether this is the name of a depth task, with any depth."""
    return _TASK_NAME.fullmatch(name) is not None


def parse_task_name(name: str) -> tuple[str, int]:
    """Return kind and depth of a task.

    Raises:
        ValueError: If it is not such a name, or the depth is 0.
    """
    match = _TASK_NAME.fullmatch(name)
    if not match:
        raise ValueError(
            f"{quoted(name)} is not a depth task; name one of {', '.join(TASK_KINDS)} with its "
            "depth, such as phop_6"
        )
    if not (depth := int(match[2])):
        raise ValueError(f"{name} has depth 0; a depth task takes at least one step")
    return match[1], depth


TEXT_SOURCES = ("python", "files", "hub")
"""Text sources; `data/text.py` has their classes."""


def component_order(names: Iterable[str]) -> list[str]:
    """Return the sources of a mixture in their order: texts first, then tasks by name."""
    return sorted(names, key=lambda name: (name not in TEXT_SOURCES, name))


class DepthSettings(Section):
    """Depth tasks for `data.source: depth`."""

    tasks: tuple[str, ...] = ()
    """Names of the tasks, each with its depth: `phop_6` (induction over 6 hops), `chain_8` (8
    pointers of a chain), `lookup_4` (1 to 4 lookups in a table), `s5_16` (products of up to 16
    permutations). Several tasks give equally many sequences, which begin with the task's name."""
    symbols: Literal["letters", "words"] = "letters"
    """`letters`: tokens of their own, `<|0|>` and so on. `words`: English words that are single
    tokens of `data.tokenizer`, so a pretrained model needs no new tokens; one task, not `s5`."""
    num_symbols: StrictInt = Field(default=4, ge=2, le=MAX_SYMBOLS)
    """Number of symbols of `phop`, and of entries in the table of `lookup`, which needs at least
    twice its depth."""
    length: StrictInt = Field(default=64, gt=0, le=MAX_COUNT)
    """Symbols of each sequence of `phop`."""
    num_chains: StrictInt = Field(default=2, ge=2, le=MAX_SYMBOLS)
    """Chains that are interleaved in each sequence of `chain`."""

    @field_validator("tasks")
    @classmethod
    def _refuse_unknown_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for name in tasks:
            parse_task_name(name)
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is given twice")
        return tasks

    @property
    def in_words(self) -> bool:
        """Whether the symbols are words of a text's tokenizer."""
        return self.symbols == "words"

    def to_key(self) -> dict[str, Any]:
        """Return JSON values for keys and manifests."""
        # Letters have the key that they had before there were words.
        return self.model_dump(mode="json", exclude=None if self.in_words else {"symbols"})


class DataSettings(Section):
    """Corpus, tokenizer and held-out documents."""

    source: Literal["python", "files", "hub", "depth", "mixture"] = "python"
    """`python`: Python's help topics; `files`: the files of `data.files`; `hub`: the Hugging Face
    data set `data.hub_name`; `depth`: the generated tasks of `data.depth`; `mixture`: several of
    these, at the `data.shares`."""
    shares: dict[str, StrictFloat] = Field(default={})
    """For `source: mixture`: the share of the training sequences of each component, such as
    `{python: 0.8, phop_6: 0.2}`. Components are `python`, `files`, `hub` and depth tasks; their
    shares sum to 1 and are rounded to thousandths."""
    files: tuple[str, ...] = ()
    """Paths or glob patterns of `.txt`, `.md`, `.rst`, `.jsonl` (also `.jsonl.gz`, `.jsonl.zst`) or
    `.parquet` files; a folder means all such files in it and below it."""
    hub_name: str = ""
    """For `source: hub`: a Hugging Face data set, such as `cerebras/SlimPajama-627B`, or a folder
    that the `datasets` library can read. `NAME@REVISION` is a branch, tag or commit; prepared data
    stay as they are when the data set changes."""
    hub_config: str | None = None
    """Configuration of the Hugging Face data set, if it has several."""
    text_field: str = "text"
    """Field that holds the text in JSON lines, Parquet and Hugging Face data sets. JSON lines may
    have `prompt` and `completion` instead: the model reads both and learns the completion."""
    chat_template: StrictBool = False
    """Write each `prompt` and `completion` of JSON lines by the chat template of the model whose
    folder `tokenizer` names."""
    max_documents: StrictInt | None = Field(default=None, gt=0)
    """Read at most this many documents (default: all)."""
    passage_characters: StrictInt | None = Field(default=None, ge=100, le=MAX_COUNT)
    """Cut long documents, such as books, at ends of paragraphs into passages of about this many
    characters. Each passage is then a document, so it may be held out (default: no cuts)."""
    validation_fraction: StrictFloat = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the documents held out for validation and tasks, chosen by content hash."""
    tokenizer: str = "train"
    """`train` a byte-level BPE, or the path of a `tokenizer.json`, or `hub:NAME`."""
    vocab_size: StrictInt = Field(default=2048, ge=258, le=MAX_VOCAB_SIZE)
    """Entries of a trained tokenizer."""
    depth: DepthSettings = DepthSettings()
    """Generated tasks of known depth."""

    @field_validator("shares")
    @classmethod
    def _refuse_bad_shares(cls, shares: dict[str, float]) -> dict[str, float]:
        for name, share in shares.items():
            if is_depth_task(name):
                parse_task_name(name)
            elif name not in TEXT_SOURCES:
                raise ValueError(
                    f"{quoted(name)} is not a source; sources are {', '.join(TEXT_SOURCES)} and "
                    "depth tasks such as phop_6"
                )
            if share <= 0:
                raise ValueError(f"the share of {name} is {share:g}; it must be above 0")
        total = math.fsum(shares.values())
        if shares and abs(total - 1) > 1e-6:
            raise ValueError(f"the shares sum to {total:.6g}; they must sum to 1")
        return shares

    @property
    def texts(self) -> dict[str, DataSettings]:
        """The text sources of a mixture, each with the settings that it would have alone."""
        # What a source alone does not read is at its default, so that its key does not depend on
        # the other sources of the mixture.
        of_mixtures = {"shares": {}, "depth": DepthSettings()}
        of_files = {"files": ()}
        of_hub = {"hub_name": "", "hub_config": None}
        unread: dict[str, dict[str, Any]] = {
            "python": of_mixtures | of_files | of_hub,
            "files": of_mixtures | of_hub,
            "hub": of_mixtures | of_files,
        }
        return {
            name: self.model_copy(update=unread[name] | {"source": name})
            for name in component_order(self.shares)
            if name in TEXT_SOURCES
        }

    @property
    def has_words(self) -> bool:
        """Whether there are depth tasks whose symbols are words of a text's tokenizer."""
        has_tasks = self.source == "depth" or bool(self.tasks.tasks)
        return has_tasks and self.depth.in_words

    @property
    def tasks(self) -> DepthSettings:
        """The depth tasks of a mixture, with their options."""
        names = (name for name in component_order(self.shares) if name not in TEXT_SOURCES)
        return self.depth.model_copy(update={"tasks": tuple(names)})

    def read_by_source(self) -> dict[str, Any]:
        """Return the settings that the source reads, as JSON values, for keys and manifests."""
        unread = {"mixture": set(), "depth": {"shares"}}.get(self.source, {"shares", "depth"})
        # Data without these settings keep the key that they had before there were any.
        if self.passage_characters is None:
            unread = unread | {"passage_characters"}
        if not self.chat_template:
            unread = unread | {"chat_template"}
        values = self.model_dump(mode="json", exclude=unread)
        if "depth" in values:
            values["depth"] = self.depth.to_key()
        return values
