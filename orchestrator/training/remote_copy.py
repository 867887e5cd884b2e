"""A second place for a run's checkpoints: any file system that pyarrow knows, by its URI.

The run's folder stays the truth; what is written there is copied to `URI/RUN/step_...` by the
thread that wrote it, `provenance.json` last, so that a copy that was cut off is seen to be none. A
machine that has lost the folder, or never had it, fetches the newest whole copy and goes on from
it. A store that does not answer costs the copy and a remark, never the training: the next
checkpoint is copied with what is missing then.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pyarrow import fs
from pyarrow.lib import ArrowException

from orchestrator.settings import storage_problem
from orchestrator.training.checkpoint import PROVENANCE, check_checkpoint
from orchestrator.training.checkpoint_lookup import find_checkpoints
from orchestrator.workspace.credentials import mask_secrets
from orchestrator.workspace.errors import UserError

COPY_ERRORS = (OSError, ArrowException)
"""What a store that does not answer, or refuses, looks like."""


class RemoteCopy:
    """The copies of one run."""

    def __init__(self, uri: str, run_folder: Path) -> None:
        """Find the store.

        Args:
            uri: `s3://bucket/path`, `gs://bucket/path`, `hdfs://...`, `file:///path` or a path.
            run_folder: The run; its name is that of its copies' folder.

        Raises:
            UserError: If no file system goes by that URI, it does not answer, or it holds a secret.
        """
        if problem := storage_problem(uri):
            raise UserError(f"cluster.storage: {problem}")
        try:
            self._store, root = fs.FileSystem.from_uri(uri)
        except COPY_ERRORS as error:
            raise UserError(
                f"cluster.storage: {uri!r} names no storage that can be used ({one_line(error)}); "
                "write s3://BUCKET/PATH, gs://BUCKET/PATH, file:///PATH or an absolute path"
            ) from None
        self._run_folder = run_folder
        self._root = PurePosixPath(root) / run_folder.name

    def send(self) -> None:
        """Copy the run's checkpoints that are not there yet, and delete the copies of those gone.

        Raises:
            OSError: If the store does not take them.
            ArrowException: The same, from a store that says so in its own way.
        """
        kept = find_checkpoints(self._run_folder)
        there = self._whole_copies()
        for checkpoint in kept:
            if checkpoint.name not in there:
                self._send(checkpoint)
        for name in set(there) - {checkpoint.name for checkpoint in kept}:
            # Without its last file a copy is none, however far the deletion comes.
            self._store.delete_file(str(self._root / name / PROVENANCE))
            self._store.delete_dir(str(self._root / name))

    def fetch(self, warn: Callable[[str], None]) -> Path | None:
        """Bring back the newest copy that is whole; None if there is none.

        Args:
            warn: Told of a copy that is damaged, and passed over.

        Raises:
            OSError: If the store does not answer.
            ArrowException: The same, from a store that says so in its own way.
        """
        for name in sorted(self._whole_copies(), reverse=True):
            temporary = self._run_folder / f"{name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            fs.copy_files(str(self._root / name), str(temporary), source_filesystem=self._store)
            try:
                check_checkpoint(temporary)
            except UserError as error:
                warn(f"{error}; an earlier copy is used")
                shutil.rmtree(temporary, ignore_errors=True)
                continue
            return temporary.rename(self._run_folder / name)
        return None

    def _send(self, checkpoint: Path) -> None:
        target = self._root / checkpoint.name
        self._store.create_dir(str(target), recursive=True)
        files = sorted(checkpoint.iterdir(), key=lambda path: path.name == PROVENANCE)
        for path in files:
            if path.is_file():
                fs.copy_files(
                    str(path), str(target / path.name), destination_filesystem=self._store
                )

    def _whole_copies(self) -> list[str]:
        """Return the names of copies that were finished."""
        listed = self._store.get_file_info(
            fs.FileSelector(str(self._root), recursive=True, allow_not_found=True)
        )
        paths = [PurePosixPath(info.path) for info in listed if info.type == fs.FileType.File]
        return [path.parent.name for path in paths if path.name == PROVENANCE]


def one_line(error: Exception) -> str:
    """Return what a store says, without its line breaks and without passwords."""
    return " ".join(mask_secrets(str(error)).split())
