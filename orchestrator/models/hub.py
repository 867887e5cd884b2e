"""The Hugging Face hub: whether it can be reached, downloads, and uploads of models.

A name is `hub:OWNER/NAME`, or `hub:OWNER/NAME@REVISION` for a branch, tag or commit. A download is
a folder in the hub's own cache, so that other programs use the same files; without a network, what
is there is used. Gated and private models need a token, which the hub's library finds by itself
(`HF_TOKEN`, or `hf auth login`). Its libraries retry for 23 seconds per data set before they give
up, so the hub is probed first; and they read `HF_HUB_OFFLINE` only when they are imported.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import urlsplit

from yaml import YAMLError

from orchestrator.models.folder import MODEL_PATTERNS
from orchestrator.workspace.errors import UserError, first_line, mask_secrets

HUB_PREFIX = "hub:"
MODEL_CARD = "README.md"
"""File of a model's folder with its card, whose metadata name the license."""
OTHER_FORMATS = ("consolidated*", "original/*", "onnx/*", "openvino/*", "coreml/*")
"""Files with the same weights for other programs, which are not downloaded."""

DEFAULT_ENDPOINT = "https://huggingface.co"
PROBE_SECONDS = 1.5
DRY_RUN = "a dry run downloads nothing"

_FLAG = "HF_HUB_OFFLINE"
_TRUE = {"1", "ON", "YES", "TRUE"}
_REFUSALS = {
    "GatedRepoError": " is gated: accept its terms on its page, then set HF_TOKEN, or log in with "
    "`hf auth login`",
    "RevisionNotFoundError": ": the hub has no such branch, tag or commit of it",
    "RepositoryNotFoundError": ": the hub has no such model, or it is private and the token may "
    "not read it",
    "LocalTokenNotFoundError": " needs a token of the hub: set HF_TOKEN, give --token, or log in "
    "with `hf auth login`",
}
"""Errors of the hub's library that users are likely to meet."""
_reasons: list[str] = []
"""Reasons of the active blocks of `offline`."""


# The network


def hub_problem() -> str | None:
    """Return briefly why the hub cannot be reached; None if it seems reachable."""
    if os.environ.get(_FLAG, "").upper() in _TRUE:
        return _reasons[0] if _reasons else f"{_FLAG} is set"
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return None  # A direct connection would prove nothing; the client reports failures.
    address = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
    try:
        endpoint = urlsplit(address)
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        socket.create_connection((endpoint.hostname, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        return f"{endpoint.hostname} cannot be reached ({error})"
    except ValueError as error:
        return mask_secrets(f"HF_ENDPOINT={address} is not a valid address ({error})")
    return None


def require_hub(subject: str) -> None:
    """Raise a `UserError` at once if the hub, which `subject` needs, cannot be reached."""
    problem = hub_problem()
    if problem:
        raise UserError(
            f"{subject} needs the hub: {problem}; use data.source=files with files of this "
            "machine, or data.source=python"
        )


@contextmanager
def offline(reason: str = "") -> Iterator[None]:
    """Keep the hub's libraries off the network in a block, even if they are already imported.

    Args:
        reason: Why, such as `DRY_RUN`.
    """
    flag_before = os.environ.get(_FLAG)
    _reasons.append(reason or f"{_FLAG} is set")
    _set_flag("1")
    try:
        yield
    finally:
        _set_flag(flag_before)
        _reasons.pop()


def _set_flag(value: str | None) -> None:
    os.environ.pop(_FLAG, None)
    if value is not None:
        os.environ[_FLAG] = value
    # The libraries copy the variable to these modules at import.
    for name in ("huggingface_hub.constants", "datasets.config"):
        if module := sys.modules.get(name):
            setattr(module, _FLAG, (value or "").upper() in _TRUE)


# Models


def is_hub_name(name: Path | str) -> bool:
    """Return whether a name is that of a repository on the hub."""
    return str(name).startswith(HUB_PREFIX)


def download(name: Path | str, *, weights: bool = True) -> Path:
    """Return the folder of a model of the hub, with configuration, tokenizer, code and weights.

    Raises:
        UserError: If there is no such model, the token may not read it, or the hub cannot be
            reached and the model is not in the cache.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = str(name).removeprefix(HUB_PREFIX).partition("@")
    problem = hub_problem()
    with _errors_explained(str(name)), offline() if problem else nullcontext():
        try:
            return Path(
                snapshot_download(
                    repository,
                    revision=revision or None,
                    endpoint=_endpoint(),
                    allow_patterns=[*MODEL_PATTERNS, MODEL_CARD],
                    ignore_patterns=[*OTHER_FORMATS, *([] if weights else ["*.safetensors"])],
                    local_files_only=problem is not None,
                )
            )
        except LocalEntryNotFoundError as error:
            raise UserError(
                f"{name} is not in the hub's cache ({constants.HF_HUB_CACHE}), and "
                f"{problem or first_line(error)}"
            ) from None


def license_of(folder: Path) -> str | None:
    """Return the license that a model's card names; None without a readable card."""
    from huggingface_hub import ModelCard

    path = folder / MODEL_CARD
    if not path.is_file():
        return None
    try:
        card = ModelCard.load(path, ignore_metadata_errors=True)
    except (OSError, ValueError, YAMLError):  # Anything may be called README.md.
        return None
    return str(card.data.license) if card.data.license else None


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

    with _errors_explained(f"--push-to-hub {repository}"):
        HfApi(endpoint=_endpoint(), token=token).whoami()


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


def _endpoint() -> str | None:
    # The hub's library reads the variable only when it is imported.
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _errors_explained(subject: str) -> Iterator[None]:
    """Turn what the hub's library raises into a `UserError` that begins with the subject."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # The client and its libraries raise dozens of kinds.
        reason = _REFUSALS.get(type(error).__name__, f": {first_line(error, with_type=True)}")
        raise UserError(f"{subject}{reason}") from None
