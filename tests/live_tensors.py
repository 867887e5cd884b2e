"""Modes that watch operations: their names, and the memory of live tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import safetensors
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _SeesOperations(TorchDispatchMode):
    """Calls `_see` after each operation."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._see(func, args, result)
        return result

    def _see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        raise NotImplementedError


class SeenOperations(_SeesOperations):
    """Keeps the names of all operations, such as `sub` and `index_copy_`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        self.names.append(func._schema.name.removeprefix("aten::"))


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class LiveTensors(_SeesOperations):
    """Counts the bytes of all tensors that operations make, while they live."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in [*model.parameters(), *(p.grad for p in model.parameters())]:
            if tensor is not None:
                self._sizes[tensor.untyped_storage()._cdata] = 0

    def _see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        for tensor in _tensors(result):
            if not tensor.is_meta:  # It has no memory.
                self._add(tensor.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class LiveStorages(_SeesOperations):
    """Finds the peak of all memory that operations touch, also if it grows or shrinks in place."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def _see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        for tensor in _tensors((args, result)):
            self._live.add(tensor.untyped_storage())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self._live))


class LargestTensor(_SeesOperations):
    """Finds the largest tensor that an operation makes, in values of its storage."""

    def __init__(self) -> None:
        super().__init__()
        self.num_values = 0

    def _see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        for tensor in _tensors(result):
            num_values = tensor.untyped_storage().nbytes() // tensor.itemsize
            self.num_values = max(self.num_values, num_values)


class Reads:
    """Counts what was read from files: bytes that live now, those at the peak, and all."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self.total = 0
        self._live: dict[int, int] = {}

    def added(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor, and return it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            weakref.finalize(storage, self._remove, key)
        self._live[key] = self._live.get(key, 0) + tensor.nbytes
        self.now += tensor.nbytes
        self.peak = max(self.peak, self.now)
        self.total += tensor.nbytes
        return tensor

    def _remove(self, key: int) -> None:
        self.now -= self._live.pop(key)


class _CountedFile:
    """An open file of safetensors, of which it is counted what is read."""

    def __init__(self, file: Any, reads: Reads) -> None:
        self._file = file
        self._reads = reads

    def __enter__(self) -> _CountedFile:
        self._opened = self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._reads.added(self._opened.get_tensor(name))

    def get_slice(self, name: str) -> _CountedSlice:
        return _CountedSlice(self._opened.get_slice(name), self._reads)


class _CountedSlice:
    def __init__(self, tensor: Any, reads: Reads) -> None:
        self._tensor = tensor
        self._reads = reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)

    def __getitem__(self, rows: Any) -> torch.Tensor:
        return self._reads.added(self._tensor[rows])


@contextmanager
def counted_reads() -> Iterator[Reads]:
    """Count what is read from files of safetensors in a block."""
    reads = Reads()
    safe_open = safetensors.safe_open

    def counted(*arguments: Any, **options: Any) -> _CountedFile:
        return _CountedFile(safe_open(*arguments, **options), reads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "safe_open", counted)
        yield reads
