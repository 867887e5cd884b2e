"""Models and tokenizers of the Hugging Face hub: downloaded, found in its cache, and uploaded.

A name is `hub:OWNER/NAME`, or `hub:OWNER/NAME@REVISION` for a branch, tag or commit. A download is
a folder in the hub's own cache, so that other programs use the same files; without a network, what
is there is used. Gated and private models need a token, which the hub's library finds by itself
(`HF_TOKEN`, or `hf auth login`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from orchestrator.models.hub import hub_problem, offline
from orchestrator.workspace.errors import UserError, first_line, quoted

HUB_PREFIX = "hub:"
TOKENIZER_PATTERNS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.jinja", "config.json", "generation_config.json"),
)
MODEL_PATTERNS = (*TOKENIZER_PATTERNS, "*.json", "*.safetensors", "*.model", "*.py")
PICKLES = "pytorch_model*.bin"
"""Weights of older models, which transformers reads; only fetched if there are no others."""
OTHER_FORMATS = ("consolidated*", "original/*", "onnx/*", "openvino/*", "coreml/*")
"""The same weights once more."""


def is_hub_name(name: Path | str) -> bool:
    """Return whether a typed name or path means a repository of the hub."""
    return str(name).startswith(HUB_PREFIX)


def download_model(name: Path | str) -> Path:
    """Return the folder of a model of the hub, with configuration, weights, tokenizer and code.

    Raises:
        UserError: If there is no such model, it may not be read, or the hub cannot be reached and
            the model is not in the cache.
    """
    folder = _download(str(name), MODEL_PATTERNS)
    if not any(folder.glob("*.safetensors")):
        folder = _download(str(name), (*MODEL_PATTERNS, PICKLES))
    return folder


def download_tokenizer(name: Path | str) -> Path:
    """Return a folder with the tokenizer files of a repository of the hub.

    Raises:
        UserError: As `download_model`.
    """
    return _download(str(name), TOKENIZER_PATTERNS)


def shown_path(folder: Path) -> Path:
    """Return `OWNER/NAME` for a folder in the hub's cache, whose own name is a hash."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return Path(*repository.split("--")[1:])
    return folder


def shown_name(folder: Path) -> str:
    """Return a folder's name; `OWNER/NAME` for one in the hub's cache."""
    shown = shown_path(folder)
    return folder.name if shown == folder else shown.as_posix()


def check_upload(repository: str, token: str | None = None) -> None:
    """Check that a model can be uploaded, before it is exported.

    Raises:
        UserError: If the hub cannot be reached, or does not accept the token.
    """
    if problem := hub_problem():
        raise UserError(
            f"--push-to-hub {repository} needs the Hugging Face hub: {problem}; export without it, "
            f"and `hf upload {repository} FOLDER` uploads the folder later"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    with _errors_explained(f"--push-to-hub {repository}"):
        try:
            HfApi(endpoint=_endpoint(), token=token).whoami()
        except LocalTokenNotFoundError:
            raise UserError(
                f"--push-to-hub {repository} needs a token of the hub: set HF_TOKEN, give --token, "
                "or log in with `hf auth login`"
            ) from None


def upload_model(
    folder: Path, repository: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload an exported folder, and return the address of its page.

    Args:
        repository: `OWNER/NAME`, or a name of the token's owner; made if it is missing.
        private: Whether a new repository is private; as its owner's settings say when unset.
        token: Token of the hub; see the module's docstring when unset.

    Raises:
        UserError: If the hub refuses it.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint(), token=token)
    with _errors_explained(f"--push-to-hub {repository}"):
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Export of iiet-orch"
        )
    return str(address)


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    problem = hub_problem()
    with _errors_explained(name), offline() if problem else nullcontext():
        try:
            folder = snapshot_download(
                repository,
                revision=revision or None,
                endpoint=_endpoint(),
                allow_patterns=list(patterns),
                ignore_patterns=list(OTHER_FORMATS),
                local_files_only=problem is not None,
            )
        except LocalEntryNotFoundError as error:
            raise UserError(
                f"{name} is not in the hub's cache ({constants.HF_HUB_CACHE}), and "
                f"{problem or first_line(error)}"
            ) from None
    return Path(folder)


def _endpoint() -> str | None:
    # The hub's library reads the variable only when it is imported.
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _errors_explained(subject: str) -> Iterator[None]:
    """Turn what the hub's library raises into a `UserError` that begins with the subject."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.HFValidationError as error:
        raise UserError(f"{quoted(subject)}: {first_line(error)}") from None
    except errors.GatedRepoError:
        raise UserError(
            f"{subject} is gated: accept its terms on its page, then set HF_TOKEN, or log in with "
            "`hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{subject}: the hub has no such branch, tag or commit of it") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{subject}: the hub has no such model, or it is private and the token may not read it"
        ) from None
    except Exception as error:  # The client and its libraries raise dozens of kinds.
        raise UserError(f"{subject}: {first_line(error, with_type=True)}") from None
