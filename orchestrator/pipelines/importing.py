"""Import a model folder or a GGUF file from elsewhere as a checkpoint of the workspace.

The result is a checkpoint like any other, with the model's special tokens and chat template, but
without an optimizer state to resume from. Commands that need its tokens take the workspace's tokens
that were made with its tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from iiet.cost import num_parameters
from iiet.decoder import Decoder
from iiet.weights import CONFIG
from orchestrator.data.gguf_tokenizer import gguf_token_ids, write_gguf_tokenizer
from orchestrator.data.hub_models import download_model, is_hub_name, shown_name
from orchestrator.data.tokenizer import load_tokenizer, num_token_ids, tokenizer_path
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.imported_text import read_model_text_files
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_parameters
from orchestrator.training.checkpoint import TOKENIZER, load_provenance, save_checkpoint
from orchestrator.training.checkpoint_lookup import newest_intact_checkpoint
from orchestrator.training.gguf_file import ARCHITECTURE, GgufFile
from orchestrator.training.model_loading import (
    PUBLISHED,
    folder_kind,
    load_model,
    model_folder_key,
)
from orchestrator.training.model_lookup import hub_hint, resolve_checkpoint
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import resolve_path
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import Workspace, find_checkpoints
from orchestrator.workspace.provenance import content_key, environment, file_key


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A model from elsewhere, whatever holds it."""

    decoder: Decoder
    folder: Path
    """Holds `config.json` and the files of the tokenizer, if it has one."""
    name: str
    """Name of its folder or file."""
    run_name: str
    """Usual name of the run."""
    kind: str
    """What it was read as."""
    key: str
    """Hash of the files that determine the model."""


def import_model(
    folder: Path | str,
    *,
    workspace: Workspace | Path | str,
    tokenizer: Path | str | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make a checkpoint of a model and return it; the same import is found again.

    Args:
        folder: A model folder (in the published naming, a plain Llama folder, an exported folder, a
            checkpoint or run of another workspace), a GGUF file of a Llama, or `hub:OWNER/NAME`.
        tokenizer: A `tokenizer.json`, or `hub:NAME`, if the model has none or not the right one.
        name: Name of the run; that of the folder or file when unset.

    Raises:
        UserError: If the model cannot be read, the hub does not give it, the tokenizer does not fit
            it, or another model has the name.
    """
    context = open_context(workspace, progress)
    progress = context.progress
    progress.start("import")  # A download takes its time.
    path = _source_path(folder)
    own = tokenizer_path(tokenizer).absolute() if tokenizer else None
    with _opened(path, has_tokenizer=own is not None) as source:
        checkpoint = _stored(source, own, name, context)
    journal = Journal(checkpoint.parent)
    journal.event("imported")  # Commands without a path take the newest run.
    journal.close()
    config = source.decoder.config
    count = format_parameters(num_parameters(config))
    progress.finish(f"{source.kind}: {config.method}, {count} parameters")
    return checkpoint


def _source_path(named: Path | str) -> Path:
    if is_hub_name(named):
        return download_model(named)
    path = resolve_path(named)
    if not path.exists():
        missing = f"{path} is no model folder: there is nothing of this name"
        raise UserError(f"{missing}{hub_hint(Path(named))}")
    return path


@contextmanager
def _opened(path: Path, *, has_tokenizer: bool) -> Iterator[_Source]:
    if path.is_file():
        file = GgufFile(path)
        decoder = file.decoder()
        with TemporaryDirectory() as name:
            folder = Path(name)
            if not has_tokenizer:
                write_gguf_tokenizer(file.metadata, path, folder)
            config = {"model_type": ARCHITECTURE, **gguf_token_ids(file.metadata)}
            (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
            yield _Source(
                decoder=decoder,
                folder=folder,
                name=path.name,
                run_name=path.stem,
                kind="a GGUF file",
                key=file_key(path),
            )
        return
    if not (path / CONFIG).is_file():
        if find_checkpoints(path):
            path = resolve_checkpoint(path)
        elif files := sorted(path.glob("*.gguf")):
            raise UserError(f"{path} is no model folder; name the GGUF file in it: {files[0]}")
    decoder, kind = load_model(path), folder_kind(path)
    is_llama = kind == PUBLISHED and decoder.config.method == "vanilla"
    is_checkpoint, name = path in find_checkpoints(path.parent), shown_name(path)
    yield _Source(
        decoder=decoder,
        folder=path,
        name=name,
        run_name=path.parent.name if is_checkpoint else name.rpartition("/")[2],
        kind="a Llama folder" if is_llama else kind,
        key=model_folder_key(path),
    )


def _stored(source: _Source, tokenizer: Path | None, name: str | None, context: Context) -> Path:
    """Return the checkpoint of a model; see `import_model`."""
    config, own = source.decoder.config, source.folder / TOKENIZER
    file = tokenizer or (own if own.is_file() else None)
    if file is None:
        context.progress.note(
            f"{source.folder} has no tokenizer.json: the model can be used with token ids only; "
            "import it with --tokenizer FILE to generate and evaluate"
        )
    elif (num_ids := num_token_ids(load_tokenizer(file))) > config.vocab_size:
        whose = tokenizer or f"of {source.name}"
        raise UserError(
            f"the tokenizer {whose} has {num_ids} entries, the model only {config.vocab_size}"
        )
    text_files = read_model_text_files(source.folder, file, vocab_size=config.vocab_size)
    run_name = name or re.sub(r"[^\w.-]+", "-", source.run_name)
    run_folder = context.workspace.runs / run_name
    text = {name: content.decode("utf-8", "replace") for name, content in text_files.items()}
    key = content_key(source.key, file_key(file) if file else None, text)
    return _imported_before(run_folder, key) or save_checkpoint(
        run_folder,
        0,
        config=config,
        weights=source.decoder.state_dict(),
        training_state={},
        tokenizer_path=file,
        text_files=text_files,
        provenance={
            "objective": "import",
            "imported": {"from": source.name, "read as": source.kind, "source": key},
            "environment": environment(),
        },
    )


def _imported_before(run_folder: Path, source: str) -> Path | None:
    """Return the checkpoint of the same import; `source` is the key of what was imported."""
    if not run_folder.exists():
        return None
    checkpoint, damage = newest_intact_checkpoint(run_folder)
    if damage:
        raise UserError(f"{damage[0]}; delete {run_folder}, and the same command imports it again")
    imported = load_provenance(checkpoint).get("imported", {}) if checkpoint else {}
    if imported.get("source") != source:
        raise UserError(
            f"the workspace has another run named {run_folder.name}; choose one with --name"
        )
    return checkpoint
