"""Copies of a run's state in host memory, which a thread writes to disk while training goes on.

From a GPU, tensors are copied by a stream of their own into pinned buffers, which every copy uses
again: neither this process nor the next step's forward and backward pass wait for them. Only the
next update of the weights does, on the GPU. The rest of a sharded model waits for each tensor that
is gathered for the copy, so that no two of them take memory at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orchestrator.training.distributed import full_tensor


def pinned_like(tensor: Tensor) -> Tensor:
    """Return a new tensor in pinned memory; PyTorch rounds its bytes up to a power of two."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class HostCopies:
    """Copies nested dictionaries of tensors; one copy at a time, because they share buffers."""

    def __init__(
        self,
        device: str,
        *,
        streams: Any = torch.cuda,
        new_buffer: Callable[[Tensor], Tensor] = pinned_like,
    ) -> None:
        """Copy from a device.

        Args:
            device: Such as `cpu` or `cuda:0`.
            streams: Makes and orders streams, like `torch.cuda`.
            new_buffer: Returns a buffer of the host for a tensor of a GPU.
        """
        self._streams, self._new_buffer = streams, new_buffer
        self._stream = streams.Stream(device) if device.startswith("cuda") else None
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._done: Any = None
        self._ordered: set[int] = set()

    def copy(self, state: Any, *, keep: bool) -> Any:
        """Start to copy; `wait` says when the result is complete.

        All workers that hold shards take part. Those that do not `keep` the result get None in
        place of each tensor.
        """
        copied = self._copied(state, (), keep=keep)
        self._done = self._stream.record_event() if self._stream else None
        return copied

    def wait(self) -> None:
        """Wait until the last copy is complete; called by the thread that reads it."""
        if self._done:
            self._done.synchronize()

    def order_updates(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the updates of an optimizer begin after the copies that started before them."""
        if self._stream and id(optimizer) not in self._ordered:
            self._ordered.add(id(optimizer))
            optimizer.register_step_pre_hook(self._before_update)

    def _before_update(self, *_: Any) -> None:
        if self._done:
            self._streams.current_stream().wait_event(self._done)

    def _copied(self, value: Any, path: tuple[Any, ...], *, keep: bool) -> Any:
        if isinstance(value, Tensor):
            return self._copied_tensor(value.detach(), path, keep=keep)
        if isinstance(value, dict):
            return {k: self._copied(part, (*path, k), keep=keep) for k, part in value.items()}
        if isinstance(value, list | tuple):
            parts = (self._copied(part, (*path, n), keep=keep) for n, part in enumerate(value))
            return type(value)(parts)
        return value

    def _copied_tensor(self, tensor: Tensor, path: tuple[Any, ...], *, keep: bool) -> Tensor | None:
        whole = full_tensor(tensor)
        if not keep:
            return None
        if self._stream is None:
            return whole.to("cpu", copy=True)
        if path not in self._buffers:
            self._buffers[path] = self._new_buffer(whole)
        self._stream.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._stream):
            copied = self._buffers[path].copy_(whole, non_blocking=True)
        if whole is not tensor:  # It was gathered for the copy, and its memory is used again.
            self._streams.current_stream().wait_stream(self._stream)
        return copied
