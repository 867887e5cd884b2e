"""Write and read checkpoints of sharded models with PyTorch's distributed checkpoint (DCP).

Each worker copies its rows of weights and moments, and a thread writes them to the worker's own
files while training continues. When all have written, the first worker joins the rows of the
weights, piece by piece, to the file that an unsharded training would have written. Moments stay in
the workers' files, from which any number of workers can read its own rows. So no process ever holds
the whole model.

All files are safetensors, because DCP's own format must be unpickled, which could run code. This
module is imported only where shards are written or read: its imports take a second.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.futures
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult

from iiet.hf.weights import WEIGHTS, safetensors_head
from orchestrator.models.folder import MOMENTS_PREFIX
from orchestrator.training.world import World
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.files import UnfinishedFolder
from orchestrator.workspace.provenance import file_digest

WRITE_LIMIT = timedelta(days=1)
"""Longest wait of workers for each other's files; a lost worker is noticed at once."""
_ROWS_PREFIX = "rows"
"""Prefix of the files with the workers' rows of weights, until these are joined."""

Complete = Callable[[UnfinishedFolder, Mapping[str, str], float], None]
"""Writes the other files of a checkpoint, in the first worker's thread, and gives the folder its
name. Arguments: the folder with weights and moments; name -> SHA-256 of these files; and when
(`time.perf_counter`) the copies were made."""


class ShardSaver:
    """Saves sharded models; each worker has one and calls it at the same steps."""

    def __init__(self, world: World) -> None:
        # A separate group: collective operations of two threads must not share one.
        self._group = dist.new_group(backend="gloo", timeout=WRITE_LIMIT)
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=world.is_gpu,
                use_shared_memory=False,
                use_async_staging=False,  # The next step already changes the weights.
                use_non_blocking_copy=world.is_gpu,
            )
        )

    def start(
        self,
        folder: Path,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        complete: Complete,
    ) -> Future[None]:
        """Copy this worker's rows to the host's memory, and let a thread write them.

        The previous call must have finished.

        Returns:
            A future that ends on all workers when the folder is complete, or with the first error
            of any worker; a lost worker gives a `RunFailed`.
        """
        writer = _Writer(folder, weights, moments, complete)
        saving = async_save(
            {**weights, **moments},
            storage_writer=writer,
            process_group=self._group,
            async_stager=self._stager,
        )
        assert isinstance(saving, Future), "the copies are made before this returns"
        saved: Future[None] = Future()
        saving.add_done_callback(partial(_end, saved, writer))
        return saved

    def close(self) -> None:
        """Free the memory of the copies."""
        self._stager.close()


def _end(saved: Future[None], writer: _Writer, saving: Future[Any]) -> None:
    """End the future of a checkpoint like DCP's own future."""
    writer.close()
    error = saving.exception()
    if error is None:
        saved.set_result(None)
    elif isinstance(error, CheckpointException):  # What workers raised, by rank.
        reason, _ = next(iter(error.failures.values()))
        saved.set_exception(reason)
    else:
        saved.set_exception(RunFailed(f"a worker was lost while a checkpoint was written: {error}"))


@dataclass(frozen=True)
class _Shard:
    """A file of one worker."""

    name: str
    digest: str
    """Its SHA-256."""


class _Writer(HuggingFaceStorageWriter):
    """Writes the shards of one checkpoint; each worker has one, in its thread."""

    def __init__(
        self,
        folder: Path,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        complete: Complete,
    ) -> None:
        # DCP writes tensors with the same number to one file of each worker.
        numbers = {**dict.fromkeys(weights, 1), **dict.fromkeys(moments, 2)}
        # The path changes to the unfinished folder when the first worker has made it.
        super().__init__(str(folder.parent), fqn_to_index_mapping=numbers, save_distributed=True)
        self.per_thread_copy_ahead = 0  # Nothing is on a GPU any more.
        self._folder = folder
        self._weights = frozenset(weights)
        self._complete = complete
        self._unfinished: UnfinishedFolder | None = None
        self._copied_at = math.nan

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Note the time; this is the first call in the thread."""
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self._copied_at = time.perf_counter()

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder on the first worker, and tell all where it is."""
        self._unfinished = UnfinishedFolder(self._folder)
        folder = {"folder": str(self._unfinished.path)}
        plans = super().prepare_global_plan(plans)
        return [replace(plan, storage_data={**plan.storage_data, **folder}) for plan in plans]

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        """Write this worker's rows; each result names the file of its rows."""
        self.path = Path(plan.storage_data["folder"])
        results: list[WriteResult] = super().write_data(plan, planner).value()
        number = f"{plan.storage_data['shard_index']:05d}-of-{dist.get_world_size():05d}"
        shards: dict[str, _Shard] = {}
        for result in results:
            written = result.storage_data.relative_path
            if written not in shards:
                is_weight = result.index.fqn in self._weights
                prefix = _ROWS_PREFIX if is_weight else MOMENTS_PREFIX
                path = self.path / f"{prefix}-{number}.safetensors"
                (self.path / written).rename(path)
                shards[written] = _Shard(path.name, file_digest(path))
        written_shards: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        written_shards.set_result(
            [
                replace(result, storage_data=shards[result.storage_data.relative_path])
                for result in results
            ]
        )
        return written_shards

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Complete the folder on the first worker, after all have written."""
        assert self._unfinished is not None, "it was made with the plan"
        folder = self._unfinished.path
        # Name of a weight -> the first row in each worker's file, and that file.
        files_by_row: dict[str, list[tuple[Sequence[int], Path]]] = defaultdict(list)
        checksums: dict[str, str] = {}
        for result in chain.from_iterable(results):
            shard: _Shard = result.storage_data
            if result.index.fqn in self._weights:
                first_row = tuple(result.index.offset or ())
                files_by_row[result.index.fqn].append((first_row, folder / shard.name))
            else:
                checksums[shard.name] = shard.digest
        shapes: dict[str, Sequence[int]] = {}
        pieces: dict[str, list[Path]] = {}
        for name, rows_and_files in files_by_row.items():
            stored: Any = metadata.state_dict_metadata[name]
            assert stored.properties.dtype == torch.float32, f"{name} is {stored.properties.dtype}"
            shapes[name] = stored.size
            pieces[name] = [file for _, file in sorted(rows_and_files)]
        checksums[WEIGHTS] = write_whole(folder / WEIGHTS, shapes, pieces)
        for file in set(chain.from_iterable(pieces.values())):
            file.unlink()
        self._complete(self._unfinished, checksums, self._copied_at)
        self.close()

    def close(self) -> None:
        """On the first worker, delete the folder if it is not complete."""
        unfinished = self._unfinished
        self._unfinished = None
        if unfinished is not None:
            unfinished.close()


def write_whole(
    path: Path, shapes: Mapping[str, Sequence[int]], pieces: Mapping[str, Sequence[Path]]
) -> str:
    """Write whole float32 tensors whose rows are in several safetensors files, piece by piece.

    Args:
        path: The file, whose bytes equal those of `safetensors.torch.save_file`.
        shapes: Name -> shape of each tensor.
        pieces: Name -> the files with its rows, in order; the tensor has the same name in each.

    Returns:
        The SHA-256 of the file.
    """
    names, head = safetensors_head({name: (torch.float32, shapes[name]) for name in shapes})
    digest = hashlib.sha256()
    with path.open("wb") as whole:

        def write(data: Any) -> None:
            digest.update(data)
            whole.write(data)

        write(head)
        for name in names:
            for piece in pieces[name]:
                # Opened for each tensor, because pages that were read stay in memory until it is
                # closed.
                with safe_open(piece, framework="numpy") as rows:
                    write(rows.get_tensor(name).data)
    return digest.hexdigest()


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors by name from the safetensors of a checkpoint; a sharded tensor with its own
    rows."""
    # Each worker plans its own reads, so none waits for the others.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
