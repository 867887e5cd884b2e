"""Copies of a run's checkpoints on a remote file system, as `URI/RUN-KEY/step_...`.

The key is that of the training: runs of the same name may share a storage. A thread copies while
the run trains on and writes further checkpoints, the newest one first. `provenance.json` is copied
last, so that an interrupted copy is recognized; what was sent before a kill is not sent again. A
machine without the run folder downloads the newest intact copy. If the storage does not answer,
training continues, and the next checkpoint is copied with the missing ones.

Ray Train's own upload is not used: it starts anew after a kill, has a state file of its own that
may be damaged then, and is not there where one worker trains without Ray. DCP's writer for remote
file systems is private, and its checkpoints would be in the storage only.
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
"""File of a copy that is not complete: the provenance of the checkpoint that is copied."""


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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._uploads: list[Future[None]] = []
        self._choosing = Lock()
        self._is_closing = False
        self._uploading: Path | None = None

    def start(
        self, event: Callable[..., None], *, num_kept: int, names_kept: Collection[str] = ()
    ) -> None:
        """Let the thread copy the checkpoints that are missing there, and delete old copies.

        Args:
            event: Called by the thread with `uploaded` and the step for each copy, or with
                `not copied` and a sentence if the storage fails or a checkpoint is damaged.
            num_kept: The newest copies that stay; another machine may have made them, so the run
                folder does not say which. What is in the run folder stays, too.
            names_kept: Checkpoints whose copies stay.
        """
        self._uploads = [upload for upload in self._uploads if not upload.done()]
        self._uploads.append(
            self._pool.submit(self._upload_missing, event, num_kept, frozenset(names_kept))
        )

    def wait(self) -> None:
        """Wait until everything is copied, or the storage has failed."""
        for upload in self._uploads:
            upload.result()

    def close(self) -> None:
        """Wait until the thread has copied the checkpoint that it has begun with; the next run
        copies the others."""
        self._is_closing = True
        self._pool.shutdown(cancel_futures=True)

    @contextmanager
    def kept(self) -> Iterator[set[Path]]:
        """Yield what must not be deleted in the `with` block: the checkpoint that is being copied;
        no other copy begins meanwhile."""
        with self._choosing:
            yield {self._uploading} if self._uploading else set()

    def _upload_missing(
        self, event: Callable[..., None], num_kept: int, names_kept: frozenset[str]
    ) -> None:
        try:
            copied = {name for name, files in self._copies().items() if is_complete(files)}
            tried = set(copied)
            while checkpoint := self._choose(tried):
                started = time.perf_counter()
                tried.add(checkpoint.name)
                try:
                    check_checkpoint(checkpoint, with_training_state=True)
                except UserError as error:  # It may come from before a loss of power.
                    event("not copied", text=f"{error}; it is not copied")
                    continue
                self._upload_one(checkpoint)
                copied.add(checkpoint.name)
                seconds = round(time.perf_counter() - started, 3)
                event("uploaded", step=step_of(checkpoint), seconds=seconds)
            self._delete_old(copied, num_kept, names_kept)
        except self._errors as error:
            text = f"no copy in {self._uri}: {_one_line(error)}"
            event("not copied", text=f"{text}; training continues and tries again later")
        finally:
            self._uploading = None

    def _choose(self, tried: set[str]) -> Path | None:
        """Return the newest checkpoint whose name is not in `tried`, as the one that is copied now;
        None if there is none, or the run ends."""
        with self._choosing:
            checkpoints = find_checkpoints(self._run_folder)
            missing = [path for path in checkpoints if path.name not in tried]
            self._uploading = missing[-1] if missing and not self._is_closing else None
            return self._uploading

    def _delete_old(self, complete: set[str], num_kept: int, names_kept: frozenset[str]) -> None:
        """Delete all copies but the newest complete ones and those to keep."""
        present = {checkpoint.name for checkpoint in find_checkpoints(self._run_folder)}
        kept = present | names_kept | set(sorted(complete)[-num_kept:])
        for name, files in self._copies().items():
            if name in kept:
                continue
            # The last file first: a deletion that is interrupted leaves no complete copy.
            if PROVENANCE in files:
                self._store.delete_file(str(self._root / name / PROVENANCE))
            self._store.delete_dir(str(self._root / name))

    def _upload_one(self, checkpoint: Path) -> None:
        target = self._root / checkpoint.name
        provenance = (checkpoint / PROVENANCE).read_bytes()
        sent = self._sent_files(target, provenance)
        for path in sorted(checkpoint.iterdir()):
            # The times in the file of verified ones differ there.
            if not path.is_file() or path.name in (PROVENANCE, VERIFIED_NAME):
                continue
            if sent.get(path.name) != path.stat().st_size:
                send(path, self._store, str(target / path.name))
        send(checkpoint / PROVENANCE, self._store, str(target / PROVENANCE))
        self._store.delete_file(str(target / BEGUN))

    def _sent_files(self, target: PurePosixPath, provenance: bytes) -> dict[str, int]:
        """Return name -> size of the files that an interrupted upload of the same checkpoint has
        sent. Before the first one, begin the copy."""
        selector = self._fs.FileSelector(str(target), allow_not_found=True)
        sent = {
            Path(info.path).name: int(info.size or 0)
            for info in self._store.get_file_info(selector)
        }
        if sent.get(BEGUN) == len(provenance):
            with self._store.open_input_stream(str(target / BEGUN)) as begun:
                if begun.read() == provenance:
                    return sent
        if sent:  # Of a checkpoint that was written again since.
            self._store.delete_dir(str(target))
        self._store.create_dir(str(target), recursive=True)
        with self._store.open_output_stream(str(target / BEGUN)) as begun:
            begun.write(provenance)
        return {}

    def download(self, warn: Callable[[str], None]) -> Path | None:
        """Download the newest intact copy of this training; None if there is none.

        Warns of each that is damaged, or belongs to another training.

        Raises:
            RunFailed: If the storage fails.
        """
        try:
            copies = [name for name, files in self._copies().items() if is_complete(files)]
            for name in sorted(copies, reverse=True):
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

    def _copies(self) -> dict[str, set[str]]:
        """Return the name of each copy, and the names of its files."""
        selector = self._fs.FileSelector(str(self._root), recursive=True, allow_not_found=True)
        copies: dict[str, set[str]] = {}
        for info in self._store.get_file_info(selector):
            path = PurePosixPath(info.path)
            if path.parent != self._root:
                copies.setdefault(path.parent.name, set()).add(path.name)
        return copies


def send(file: Path, store: Any, target: str) -> None:
    """Copy a file to a path on a file system of pyarrow."""
    from pyarrow import fs

    fs.copy_files(str(file), target, destination_filesystem=store)


def is_complete(files: Collection[str]) -> bool:
    """Return whether a copy with these files has all of them."""
    return PROVENANCE in files and BEGUN not in files


def _one_line(error: Exception) -> str:
    return " ".join(mask_secrets(str(error)).split())
