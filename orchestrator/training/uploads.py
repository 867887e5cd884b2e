"""Upload a run's checkpoints to a remote file system, as `URI/RUN-KEY/step_...`, and download them.

The key is that of the training, so runs of the same name may share a storage. A thread uploads the
newest checkpoint first, while training continues. `provenance.json` is sent last, which marks an
upload as complete; files that were sent before a kill are not sent again. A machine without the run
folder downloads the newest intact checkpoint. If the storage does not answer, training continues,
and the missing checkpoints are sent with the next one.

Ray Train's own upload is not used. It starts again from the beginning after a kill, keeps a state
file that a kill may damage, and does not exist where one worker trains without Ray. DCP's writer
for remote file systems is private, and would write checkpoints to the storage only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from orchestrator.models.folder import JOB_KEY, check_checkpoint, load_provenance
from orchestrator.settings import storage_problem
from orchestrator.workspace.errors import RunFailed, UserError, mask_secrets
from orchestrator.workspace.files import VERIFIED_NAME, new_folder
from orchestrator.workspace.layout import PROVENANCE, find_checkpoints, step_of

BEGUN = "uploading.json"
"""File of an unfinished upload: the provenance of the checkpoint that is sent."""


class CheckpointUploads:
    """The uploads of one run's checkpoints."""

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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._uploads: list[Future[None]] = []
        self._choosing = Lock()
        self._is_closing = False
        self._uploading: Path | None = None

    def start(
        self, event: Callable[..., None], *, num_kept: int, names_kept: Collection[str] = ()
    ) -> None:
        """Let the thread upload the checkpoints that the storage lacks, and delete old uploads.

        Args:
            event: Called by the thread with `uploaded` and the step of each checkpoint, or with
                `not uploaded` and a sentence if the storage fails or a checkpoint is damaged.
            num_kept: How many of the newest uploads to keep, also those of another machine. Uploads
                of checkpoints that the run folder still has are kept, too.
            names_kept: Names of further checkpoints whose uploads are kept.
        """
        self._uploads = [upload for upload in self._uploads if not upload.done()]
        self._uploads.append(
            self._pool.submit(self._upload_missing, event, num_kept, frozenset(names_kept))
        )

    def wait(self) -> None:
        """Wait until everything is uploaded, or the storage has failed."""
        for upload in self._uploads:
            upload.result()

    def close(self) -> None:
        """Wait until the current upload has ended; the next run uploads the others."""
        self._is_closing = True
        self._pool.shutdown(cancel_futures=True)

    @contextmanager
    def kept(self) -> Iterator[set[Path]]:
        """Yield what must not be deleted in the `with` block: the checkpoint that is being
        uploaded.

        No other upload begins meanwhile.
        """
        with self._choosing:
            yield {self._uploading} if self._uploading else set()

    def _upload_missing(
        self, event: Callable[..., None], num_kept: int, names_kept: frozenset[str]
    ) -> None:
        try:
            complete = {
                name for name, files in self._files_by_upload().items() if is_complete(files)
            }
            tried = set(complete)
            while checkpoint := self._choose(tried):
                started = time.perf_counter()
                tried.add(checkpoint.name)
                try:
                    check_checkpoint(checkpoint, with_training_state=True)
                except UserError as error:  # A power failure may have damaged it.
                    event("not uploaded", text=f"{error}; it is not uploaded")
                    continue
                self._upload_one(checkpoint)
                complete.add(checkpoint.name)
                seconds = round(time.perf_counter() - started, 3)
                event("uploaded", step=step_of(checkpoint), seconds=seconds)
            self._delete_old(complete, num_kept, names_kept)
        except self._errors as error:
            text = f"no upload to {self._uri}: {_one_line(error)}"
            event("not uploaded", text=f"{text}; training continues and tries again later")
        finally:
            self._uploading = None

    def _choose(self, tried: set[str]) -> Path | None:
        """Return the newest checkpoint whose name is not in `tried`, and mark it as being uploaded.

        None if there is none, or the run ends.
        """
        with self._choosing:
            checkpoints = find_checkpoints(self._run_folder)
            missing = [path for path in checkpoints if path.name not in tried]
            self._uploading = missing[-1] if missing and not self._is_closing else None
            return self._uploading

    def _delete_old(self, complete: set[str], num_kept: int, names_kept: frozenset[str]) -> None:
        """Delete all uploads but the newest complete ones and those to keep."""
        present = {checkpoint.name for checkpoint in find_checkpoints(self._run_folder)}
        kept = present | names_kept | set(sorted(complete)[-num_kept:])
        for name, files in self._files_by_upload().items():
            if name in kept:
                continue
            # The last file first: an interrupted deletion then leaves no complete upload.
            if PROVENANCE in files:
                self._store.delete_file(str(self._root / name / PROVENANCE))
            self._store.delete_dir(str(self._root / name))

    def _upload_one(self, checkpoint: Path) -> None:
        target = self._root / checkpoint.name
        provenance = (checkpoint / PROVENANCE).read_bytes()
        sent = self._sent_files(target, provenance)
        for path in sorted(checkpoint.iterdir()):
            # The list of verified files holds times, which differ on another machine.
            if not path.is_file() or path.name in (PROVENANCE, VERIFIED_NAME):
                continue
            if sent.get(path.name) != path.stat().st_size:
                send(path, self._store, str(target / path.name))
        send(checkpoint / PROVENANCE, self._store, str(target / PROVENANCE))
        self._store.delete_file(str(target / BEGUN))

    def _sent_files(self, target: PurePosixPath, provenance: bytes) -> dict[str, int]:
        """Return name -> size of the files that an interrupted upload of this checkpoint has sent.

        Without such an upload, begin one.
        """
        selector = self._fs.FileSelector(str(target), allow_not_found=True)
        sent = {
            Path(info.path).name: int(info.size or 0)
            for info in self._store.get_file_info(selector)
        }
        if sent.get(BEGUN) == len(provenance):
            with self._store.open_input_stream(str(target / BEGUN)) as begun:
                if begun.read() == provenance:
                    return sent
        if sent:  # The checkpoint was written again since.
            self._store.delete_dir(str(target))
        self._store.create_dir(str(target), recursive=True)
        with self._store.open_output_stream(str(target / BEGUN)) as begun:
            begun.write(provenance)
        return {}

    def download(self, warn: Callable[[str], None]) -> Path | None:
        """Download the newest intact upload of this training; None if there is none.

        Warns of each upload that is damaged, or belongs to another training.

        Raises:
            RunFailed: If the storage fails.
        """
        try:
            complete = [
                name for name, files in self._files_by_upload().items() if is_complete(files)
            ]
            for name in sorted(complete, reverse=True):
                folder = self._run_folder / name
                source = str(self._root / name)
                try:
                    with new_folder(folder) as temporary:
                        self._fs.copy_files(source, str(temporary), source_filesystem=self._store)
                        check_checkpoint(temporary, with_training_state=True)
                        if load_provenance(temporary).get(JOB_KEY) != self._key:
                            raise UserError(f"{source} belongs to another training")
                except UserError as error:
                    warn(f"{error}; an earlier upload is used")
                else:
                    return folder
        except self._errors as error:
            raise RunFailed(
                f"{self._uri} may hold checkpoints to resume from, and does not answer "
                f"({_one_line(error)}); try again, or unset cluster.storage to start anew"
            ) from None
        return None

    def _files_by_upload(self) -> dict[str, set[str]]:
        """Return name of each upload -> names of its files."""
        selector = self._fs.FileSelector(str(self._root), recursive=True, allow_not_found=True)
        files: dict[str, set[str]] = {}
        for info in self._store.get_file_info(selector):
            path = PurePosixPath(info.path)
            if path.parent != self._root:
                files.setdefault(path.parent.name, set()).add(path.name)
        return files


def send(file: Path, store: Any, target: str) -> None:
    """Upload a file to a path on a file system of pyarrow."""
    from pyarrow import fs

    fs.copy_files(str(file), target, destination_filesystem=store)


def is_complete(files: Collection[str]) -> bool:
    """Return whether an upload with these files is complete."""
    return PROVENANCE in files and BEGUN not in files


def _one_line(error: Exception) -> str:
    return " ".join(mask_secrets(str(error)).split())
