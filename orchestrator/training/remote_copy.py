"""Copies of a run's checkpoints on a remote file system, as `URI/RUN-KEY/step_...`.

The key is that of the training: runs of the same name may share a storage. `provenance.json` is
copied last, so that an interrupted copy is recognized. A machine without the run folder downloads
the newest intact copy. If the storage does not answer, training continues, and the next checkpoint
is copied with the missing ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from orchestrator.models.folder import JOB_KEY, check_checkpoint, load_provenance
from orchestrator.settings import storage_problem
from orchestrator.workspace.errors import RunFailed, UserError, mask_secrets
from orchestrator.workspace.files import VERIFIED_NAME, new_folder
from orchestrator.workspace.layout import PROVENANCE, find_checkpoints


class RemoteCopy:
    """The remote copies of one run's checkpoints."""

    def __init__(self, uri: str, run_folder: Path, key: str) -> None:
        """Open the storage: `s3://BUCKET/PATH`, `gs://BUCKET/PATH`, `file:///PATH` or a path.

        `key` is that of the training.

        Raises:
            UserError: If the URI names no usable file system, or contains a secret.
        """
        from pyarrow import fs, lib  # Slow: only a run with a storage imports it.

        self._fs = fs
        self._errors = (OSError, lib.ArrowException)
        if problem := storage_problem(uri):
            raise UserError(f"cluster.storage: {problem}")
        try:
            self._store, root = fs.FileSystem.from_uri(uri)
        except self._errors as error:
            raise UserError(
                f"cluster.storage: {uri!r} names no storage that can be used ({_one_line(error)}); "
                "write s3://BUCKET/PATH, gs://BUCKET/PATH, file:///PATH or an absolute path"
            ) from None
        self._uri = uri
        self._run_folder = run_folder
        self._key = key
        self._root = PurePosixPath(root) / f"{run_folder.name}-{key}"

    def upload(self, step: int, event: Callable[..., None]) -> None:
        """Copy the checkpoints that are missing there; delete the copies of deleted checkpoints.

        A storage that fails is the event `not copied`; otherwise `uploaded` says after which step.
        """
        started = time.perf_counter()
        try:
            checkpoints = find_checkpoints(self._run_folder)
            copied = self._complete_copies()
            for checkpoint in checkpoints:
                if checkpoint.name not in copied:
                    self._upload_one(checkpoint)
            for name in set(copied) - {checkpoint.name for checkpoint in checkpoints}:
                # The last file first: a deletion that is interrupted leaves no complete copy.
                self._store.delete_file(str(self._root / name / PROVENANCE))
                self._store.delete_dir(str(self._root / name))
        except self._errors as error:
            text = f"no copy in {self._uri}: {_one_line(error)}"
            event("not copied", text=f"{text}; training continues and tries again later")
        else:
            event("uploaded", step=step, seconds=round(time.perf_counter() - started, 3))

    def _upload_one(self, checkpoint: Path) -> None:
        target = self._root / checkpoint.name
        self._store.create_dir(str(target), recursive=True)
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == PROVENANCE):
            if path.is_file() and path.name != VERIFIED_NAME:  # Times differ there.
                self._fs.copy_files(
                    str(path), str(target / path.name), destination_filesystem=self._store
                )

    def download(self, warn: Callable[[str], None]) -> Path | None:
        """Download the newest intact copy of this training; None if there is none.

        Warns of each that is damaged, or belongs to another training.

        Raises:
            RunFailed: If the storage fails.
        """
        try:
            for name in sorted(self._complete_copies(), reverse=True):
                folder = self._run_folder / name
                source = str(self._root / name)
                try:
                    with new_folder(folder) as temporary:
                        self._fs.copy_files(source, str(temporary), source_filesystem=self._store)
                        check_checkpoint(temporary, with_training_state=True)
                        if load_provenance(temporary).get(JOB_KEY) != self._key:
                            raise UserError(f"{source} belongs to another training")
                except UserError as error:
                    warn(f"{error}; an earlier copy is used")
                else:
                    return folder
        except self._errors as error:
            raise RunFailed(
                f"{self._uri} may hold checkpoints to resume from, and does not answer "
                f"({_one_line(error)}); try again, or unset cluster.storage to start anew"
            ) from None
        return None

    def _complete_copies(self) -> list[str]:
        selector = self._fs.FileSelector(str(self._root), recursive=True, allow_not_found=True)
        paths = [PurePosixPath(info.path) for info in self._store.get_file_info(selector)]
        return [path.parent.name for path in paths if path.name == PROVENANCE]


def _one_line(error: Exception) -> str:
    return " ".join(mask_secrets(str(error)).split())
