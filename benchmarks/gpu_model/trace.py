"""Record what a piece of code would run on a GPU: kernels, memory, waits.

One operation of PyTorch counts as one kernel; views and allocations count as none. Bytes are those
of a kernel's arguments and results, each read or written once, whatever a cache holds. Live memory
is that of the storages that exist. Left out: the workspaces of kernels, and what the allocator
loses to fragmentation.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = (f"{_ROOT}/iiet/", f"{_ROOT}/orchestrator/")

FUSED_ON_GPUS = ("_fused_rms_norm", "_fused_rms_norm_backward")
"""Operations with a kernel on GPUs, which CPUs compute by several others."""
VIEWS = {"_unsafe_view", "detach", "alias", "lift_fresh", "_reshape_alias"}
"""Views that PyTorch does not mark as such."""
_OVERWRITE = {"copy_", "zero_", "fill_", "normal_", "uniform_", "exponential_"}
"""In-place operations that do not read what was there."""
_READ_ROWS = {"embedding", "index_select", "gather", "index"}
"""They read as much of their first argument as they return."""
_WRITE_ROWS = {"index_copy_", "index_copy", "scatter_", "index_put_"}
"""They write as much as their last tensor holds."""
_WAIT = {"nonzero", "masked_select", "multinomial", "_unique2", "equal"}
"""They wait for the GPU, because a shape or a check depends on values."""


Phase = Literal["forward", "backward", "update"]
"""The forward pass, the backward pass (with what it recomputes), or the rest of a training step:
clipping and the optimizer."""
_UPDATES = ("training/distributed.py:clip_gradients", "training/loop.py:train")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel on the GPU."""

    name: str
    """The operation, such as `mm`."""
    dtype: torch.dtype
    """Type of its first argument, or of a product's factors."""
    num_bytes: int
    """Bytes read and written."""
    flops: float
    """Of a matrix product or of attention; 0 for all others."""
    phase: Phase
    place: str
    """The innermost function of this project, as `iiet/layers.py:Field.forward`."""
    launches: int = 1

    @property
    def is_attention(self) -> bool:
        return "attention" in self.name

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product."""
        return self.flops > 0 and not self.is_attention


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records kernels while it is entered; code below it runs on a pretended GPU.

    Tensors on the CPU are real. A read of a value from the GPU is recorded as a wait and answers
    `answer`, because there is no value.
    """

    def __init__(self, answer: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []
        self.waits: list[str] = []
        """Place of each wait of the host for the GPU."""
        self.copies_to_gpu: list[str] = []
        """Place of each blocking copy from the host to the GPU."""
        self.live_bytes = self.peak_bytes = 0
        self._answer = answer
        self._storages: dict[int, int] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let `torch.compile` work below this mode."""
        return True

    def restart(self) -> None:
        """Forget the kernels so far; what is live stays counted."""
        self.kernels, self.waits, self.copies_to_gpu = [], [], []
        self.peak_bytes = self.live_bytes

    @property
    def num_launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        if TracingContext.try_get() is not None or name.startswith("prim::"):
            return func(*args, **kwargs)  # What a compiler looks at does not run.
        if _is_real(args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            return self._read(args[0])
        if torch.is_inference_mode_enabled() and name not in FUSED_ON_GPUS:
            # Here operations that consist of others arrive whole.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        self._record(func, name, args, kwargs, out)
        return out

    def _read(self, value: Tensor) -> Any:
        if value.is_cuda:
            self.waits.append(_place())
        if value.dtype == torch.bool:
            return bool(self._answer)
        return self._answer if value.is_floating_point() else int(self._answer)

    def _record(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        given, results = list(_tensors((args, kwargs))), list(_tensors(out))
        on_gpu = [tensor for tensor in results if tensor.is_cuda]
        for tensor in on_gpu:
            self._hold(tensor.untyped_storage())
        if not any(tensor.is_cuda for tensor in given) and not on_gpu:
            return
        if func.is_view or name in VIEWS or "empty" in name:
            return
        place = _place()
        if name in ("_to_copy", "copy_") and not kwargs.get("non_blocking", False):
            source = given[-1]
            if source.is_cuda and not on_gpu:
                self.waits.append(place)
            if on_gpu and not source.is_cuda and source.dim():
                self.copies_to_gpu.append(place)
        if name in _WAIT:
            self.waits.append(place)
        self.kernels.append(
            Kernel(
                name=name,
                dtype=_dtype(name, given or results),
                num_bytes=_bytes_moved(func, name, args, kwargs, results),
                flops=count_flops(func, name, args, kwargs, out),
                phase=_phase(place),
                place=place,
                launches=_num_launches(name, args),
            )
        )

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = size = storage.nbytes()
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live_bytes -= self._storages.pop(key)


def _is_real(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether an operation runs on the CPU, with numbers."""
    tensors = list(_tensors((args, kwargs)))
    device = kwargs.get("device")
    stays = device is None or torch.device(device).type == "cpu"
    return stays and all(not isinstance(t, FakeTensor) and t.is_cpu for t in tensors)


def count_places(places: Iterable[str]) -> dict[str, int]:
    """Return how often each place occurs, most often first."""
    return dict(Counter(places).most_common())


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def num_bytes(tensor: Tensor) -> int:
    """Count the bytes of the values that a tensor can tell apart."""
    shape = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in shape if stride)


def _bytes_moved(
    func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], results: list[Tensor]
) -> int:
    read = written = 0
    schema = func._schema.arguments
    named = {argument.name: value for argument, value in zip(schema, args, strict=False)}
    named.update(kwargs)
    for argument in schema:
        size = sum(map(num_bytes, _tensors(named.get(argument.name))))
        if argument.alias_info is None or not argument.alias_info.is_write:
            read += size
            continue
        written += size
        if not argument.is_out and name not in _OVERWRITE:
            read += size
    # Results that are no arguments are new.
    known = {id(tensor) for tensor in _tensors(named)}
    new = sum(num_bytes(tensor) for tensor in results if id(tensor) not in known)
    if name in _READ_ROWS:
        return read - num_bytes(named[schema[0].name]) + 2 * new
    if name in _WRITE_ROWS:
        *_, moved = _tensors((args, kwargs))
        return 2 * num_bytes(moved)
    return read + written + new


def _dtype(name: str, tensors: list[Tensor]) -> torch.dtype:
    # What is added to a product may have another type than its factors.
    return tensors[name.startswith(("addmm", "baddbmm"))].dtype


def count_flops(
    func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
) -> float:
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if packet not in flop_registry:
        return 0.0
    # PyTorch's counter does not know the type that some products take as an argument.
    known = [value for value in args if not isinstance(value, torch.dtype)]
    flops = float(flop_registry[packet](*known, **kwargs, out_val=out))
    if "attention" not in name:
        return flops
    names = [argument.name for argument in func._schema.arguments]
    is_causal = dict(zip(names, args, strict=False)) | dict(kwargs)
    return flops / 2 if is_causal.get("is_causal") else flops


_TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""By number of lists, of PyTorch's kernels for lists of tensors."""
_VALUES_PER_BLOCK, _BLOCKS_PER_LAUNCH = 65536, 320


def _num_launches(name: str, args: tuple[Any, ...]) -> int:
    if not name.startswith(("_foreach", "_fused_adam", "_amp_foreach")):
        return 1
    lists = [value for value in args if isinstance(value, list | tuple)]
    tensors = list(_tensors(lists[0]))
    per_launch = _TENSORS_PER_LAUNCH[min(5, len(lists))]
    blocks = sum(-(-tensor.numel() // _VALUES_PER_BLOCK) for tensor in tensors)
    return max(-(-len(tensors) // per_launch), -(-blocks // _BLOCKS_PER_LAUNCH))


def _phase(place: str) -> Phase:
    if torch._C._current_graph_task_id() != -1:
        return "backward"
    return "update" if place.endswith(_UPDATES) else "forward"


def _place() -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_SOURCES):
            path = Path(code.co_filename).relative_to(_ROOT)
            return f"{path.as_posix()}:{code.co_qualname}"
        frame = frame.f_back
    return "autograd"
