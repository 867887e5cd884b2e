"""One worker or many: the few operations that differ, each a no-op for one.

The world (rank, size, device) is passed in; nothing here starts processes. Gradients are averaged
by PyTorch's `DistributedDataParallel`, or scattered where `sharding` spread the model. Numbers that
decide what happens next (stop, divergence, losses) are agreed by all workers before anybody acts on
them, because a collective operation that one worker leaves out hangs all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from iiet.decoder import Decoder

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of one worker among all that train one model; the process group exists when size >
    1."""

    rank: int = 0
    """This worker's number, from 0."""
    size: int = 1
    """Number of workers."""
    device: str = "cpu"
    """This worker's device, such as `cpu` or `cuda:0`."""
    parallel: str = "ddp"
    """How several workers share the model: `ddp`, each has all of it, or `fsdp`, each a part."""

    @property
    def is_first(self) -> bool:
        """Whether this worker writes files and decides."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether the model is spread over the workers."""
        return self.size > 1 and self.parallel == "fsdp"


def replicate(decoder: Decoder, world: World, *, has_idle_parameters: bool) -> nn.Module:
    """Return a model whose backward pass averages gradients over all workers: the decoder itself
    for one, or where it is sharded.

    Args:
        decoder: On this worker's device.
        world: This worker's place.
        has_idle_parameters: Some parameters get no gradient in some steps, as the correction norms
            of layers without corrections; looking for them costs a walk over the graph per step.
    """
    if world.size == 1 or world.is_sharded:
        return decoder
    return DistributedDataParallel(
        decoder, find_unused_parameters=has_idle_parameters, gradient_as_bucket_view=True
    )


def without_gradient_sync(model: nn.Module, world: World) -> AbstractContextManager[None]:
    """Return a context in which backward passes only accumulate, for all but the last pass of a
    step."""
    if isinstance(model, DistributedDataParallel):
        return cast("AbstractContextManager[None]", model.no_sync())
    return _without_scattering(model) if world.is_sharded else nullcontext()


@contextmanager
def _without_scattering(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients down to a norm of `max_norm` if it is larger, and return what it was."""
    return full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_norm)).item()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor that the workers hold in shards as a whole on each of them, and any other as
    it is; every worker calls it."""
    gather = getattr(tensor, "full_tensor", None)
    return cast("Tensor", gather()) if gather else tensor


def autocast(precision: str, world: World) -> AbstractContextManager[None]:
    """Return the context of a forward pass: bf16 autocast, or nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(world.device).type, dtype=torch.bfloat16)


def mean_over_workers(values: Mapping[str, float], world: World) -> dict[str, float]:
    """Return the mean of each number over all workers; every worker passes the same names."""
    if world.size == 1:
        return dict(values)
    names = sorted(values)
    numbers = torch.tensor([values[name] for name in names], dtype=torch.float64)
    numbers = numbers.to(world.device)
    dist.all_reduce(numbers)
    return dict(zip(names, (numbers / world.size).tolist(), strict=True))


def run_on_first(decide: Callable[[], T], world: World) -> T:
    """Run a decision on the first worker and return its result on all.

    Raises:
        Exception: What the decision raised, on every worker, so that none waits for the others.
    """
    if world.size == 1:
        return decide()
    box: list[tuple[T | None, Exception | None]] = [(None, None)]
    if world.is_first:
        try:
            box = [(decide(), None)]
        except Exception as error:  # Raised below, on every worker.
            box = [(None, error)]
    dist.broadcast_object_list(box, src=0)
    result, problem = box[0]
    if problem is not None:
        raise problem
    return cast("T", result)
