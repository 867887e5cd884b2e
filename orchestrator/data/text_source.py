"""Text sources: where documents come from. Python's documentation, the user's files, hub data sets.

Other packages add sources by entry points of the group `iiet_orch.data_sources`. A source yields
documents; duplicates, the split, the tokenizer and resuming are the same for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from iiet.extensions import ExtensionError, ExtensionTable
from iiet.methods.base import NoOptions
from orchestrator.data.python_docs import PYTHON_DOCS_VERSION, python_documents, python_state
from orchestrator.data.text_files import find_files, read_file, record_text, split_long
from orchestrator.models.hub import require_hub
from orchestrator.settings import DataSettings
from orchestrator.settings.data import TEXT_SOURCES
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError

ASSUMED_BYTES_PER_DOCUMENT = 4000
"""For data sets on the hub."""
PACKAGES_TO_DECOMPRESS = {".zst": "zstandard", ".lz4": "lz4"}
"""Packages that the `datasets` library imports for compressed files."""


class TextSource(ABC):
    """Base of all text sources.

    Args:
        settings: Section `data`.
        options: An instance of the class's `Options`, from `data.source_options.NAME`.
    """

    Options: ClassVar[type[Any]] = NoOptions
    """A frozen dataclass: the options that `data.source_options.NAME` may set. Values are those of
    YAML; it raises a ValueError for what is not allowed."""
    version: ClassVar[int] = 1
    """Increase it if equal `state()` gives other documents: the data are then prepared again."""

    def __init__(self, settings: DataSettings, options: Any) -> None:
        self.settings, self.options = settings, options

    @abstractmethod
    def state(self) -> Any:
        """Return a JSON value that changes when the content does, such as sizes and times of files.

        It is part of the key of the prepared data; the settings are, too. No content is read.

        Raises:
            UserError: If the source does not exist, or its settings do not fit together.
        """

    @abstractmethod
    def documents(self, progress: Progress) -> Iterator[tuple[str, str]]:
        """Yield text and origin of each document, always in the same order.

        Equal texts are read once. `data.validation_fraction` of the documents are held out, so a
        book should be several.

        Raises:
            UserError: If the source cannot be read.
        """

    def num_bytes(self) -> int:
        """Estimate the bytes of text before they are read; 0 for a few megabytes at most."""
        return 0


class PythonDocs(TextSource):
    """English text from the standard library: help topics, docstrings and longer comments."""

    def state(self) -> Any:
        return ["python", PYTHON_DOCS_VERSION, python_state()]

    def documents(self, progress: Progress) -> Iterator[tuple[str, str]]:
        return python_documents(progress)


class TextFiles(TextSource):
    """The files that `data.files` names."""

    def state(self) -> Any:
        stats = [(str(path), path.stat()) for path in find_files(self.settings)]
        return ["files", [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]

    def documents(self, progress: Progress) -> Iterator[tuple[str, str]]:
        files = find_files(self.settings)
        progress.start("corpus", len(files))
        for done, path in enumerate(files):
            for text in read_file(path, self.settings.text_field):
                yield from ((passage, path.name) for passage in split_long(text))
            progress.advance(done + 1, path.name)

    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in find_files(self.settings))


class HubDataset(TextSource):
    """The data set `data.hub_name` of the hub."""

    def state(self) -> Any:
        self._check_settings()
        state = ["hub", self.settings.hub_name, self.settings.hub_config]
        folder = Path(self.settings.hub_name)
        if not folder.is_dir():
            return state
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            package = PACKAGES_TO_DECOMPRESS.get(path.suffix)
            if package and find_spec(package) is None:
                raise UserError(f"{path} needs {package}; run `pip install {package}`")
        stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
        return [*state, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]

    def documents(self, progress: Progress) -> Iterator[tuple[str, str]]:
        self._check_settings()
        settings, name = self.settings, self.settings.hub_name
        if not Path(name).is_dir():
            require_hub(f"the data set {name}")
        import datasets

        progress.start("corpus", settings.max_documents)
        try:
            stream = datasets.load_dataset(name, settings.hub_config, split="train", streaming=True)
            for number, record in enumerate(stream):
                text = record_text(record, settings.text_field, f"{name}, record {number}")
                yield from ((passage, name) for passage in split_long(text))
                progress.advance(number + 1, name)
        except UserError:
            raise
        except Exception as error:  # the hub's client raises dozens of kinds
            reason = " ".join(str(error).split())
            raise UserError(f"cannot read the data set {name}: {reason}") from None

    def num_bytes(self) -> int:
        return (self.settings.max_documents or 0) * ASSUMED_BYTES_PER_DOCUMENT

    def _check_settings(self) -> None:
        if not self.settings.hub_name:
            raise UserError(
                "the source `hub` reads data.hub_name, which is empty; name a data set, such as "
                "--set data.hub_name=cerebras/SlimPajama-627B"
            )


DATA_SOURCES: ExtensionTable[type[TextSource]] = ExtensionTable(
    TEXT_SOURCES,
    {"python": PythonDocs, "files": TextFiles, "hub": HubDataset},
    bases=(TextSource,),
)
"""Text sources by name; the keys are values of the setting `data.source`."""


def text_source(settings: DataSettings) -> TextSource:
    """Return the text source that the settings name, with its options.

    Raises:
        UserError: If its package is missing or broken, or an option is wrong.
    """
    name = settings.source
    try:
        kind = DATA_SOURCES[name]
    except ExtensionError as error:
        raise UserError(f"data.source: {error}") from None
    options = settings.source_options.get(name, {})
    known = [field.name for field in fields(kind.Options)]
    if unknown := [option for option in options if option not in known]:
        raise UserError(
            f"data.source_options.{name}: there is no option {', '.join(map(repr, unknown))}; "
            f"options of {name}: {', '.join(known) or 'none'}"
        )
    try:
        return kind(settings, kind.Options(**options))
    except (TypeError, ValueError) as error:
        raise UserError(f"data.source_options.{name}: {error}") from None
