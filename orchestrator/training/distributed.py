"""Operations that differ between one worker and several; each does nothing for one worker.

All workers agree on every number that decides what happens next (stop, divergence, losses) before
they act on it: a collective operation that one worker leaves out hangs all others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from iiet.decoder import Decoder
from iiet.distillation import Model

POLL_SECONDS = 0.1

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank and device of one worker. A process group exists if `size` > 1."""

    rank: int = 0
    """This worker's number, from 0."""
    size: int = 1
    """Number of workers."""
    device: str = "cpu"
    """This worker's device, such as `cpu` or `cuda:0`."""
    parallel: str = "ddp"
    """`ddp`: each worker has the whole model; `fsdp`: each worker has a shard of it."""
    shards: int | None = None
    """Workers that share one copy of the model, if not all; it divides `size`."""

    @property
    def is_first(self) -> bool:
        """Whether this worker writes files and takes decisions."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether the model is sharded over the workers."""
        return self.size > 1 and self.parallel == "fsdp"

    @property
    def num_shards(self) -> int:
        """Number of workers that share one copy of the model; 1 if each has all of it."""
        return self.shards or self.size if self.is_sharded else 1


def replicate(decoder: Decoder, world: World, *, has_idle_parameters: bool) -> nn.Module:
    """Return a model whose backward pass averages gradients over all workers.

    Args:
        decoder: Returned as it is for one worker, or if it is sharded.
        world: This worker's place.
        has_idle_parameters: Some parameters get no gradient in some steps, such as the correction
            norms of layers without corrections. Finding them costs a walk over the graph per step.
    """
    if world.size == 1 or world.is_sharded:
        return decoder
    return DistributedDataParallel(
        decoder, find_unused_parameters=has_idle_parameters, gradient_as_bucket_view=True
    )


def pass_of_several(
    model: nn.Module, world: World, *, is_last: bool
) -> AbstractContextManager[None]:
    """Return the context of one of several passes of a step, forward and backward.

    Copies of the model average their gradients in the last pass only, also those of weights that
    this pass does not use. Shards are gathered in the first pass and kept until the last one has
    ended. Gradients are sharded in every pass: whole ones between the passes would take twice the
    memory of whole weights in bf16.
    """
    if world.is_sharded:
        return _sharded_pass(model, is_last=is_last)
    if isinstance(model, DistributedDataParallel) and not is_last:
        return cast("AbstractContextManager[None]", model.no_sync())
    return nullcontext()


@contextmanager
def _sharded_pass(model: Any, *, is_last: bool) -> Iterator[None]:
    def keep_weights(*, forward: bool, backward: bool) -> None:
        model.set_reshard_after_backward(not backward)
        for layer in model.layers:  # The root never gives up its own after a forward pass.
            layer.set_reshard_after_forward(not forward, recurse=False)

    keep_weights(forward=True, backward=not is_last)
    model.set_requires_all_reduce(is_last)  # Between replicas.
    try:
        yield
    finally:
        keep_weights(forward=False, backward=False)
        model.set_requires_all_reduce(True)


def with_all_gradients(model: Model) -> Model:
    """Return a model each of whose passes gives every parameter of its method a gradient.

    The gradient is zero where the schedule of the pass does not use the parameter. Copies of shards
    add up the gradients of a step's passes, so all passes must have the same ones. Other models
    are returned as they are: they add up each parameter by itself.
    """
    decoder: Any = model
    if not hasattr(decoder, "set_requires_all_reduce"):
        return model

    def call(*inputs: Any, finish: Callable[..., Any], **options: Any) -> Any:
        def finish_with_zero(*answer: Any) -> Any:
            result = finish(*answer)
            parameters = decoder.method_parameters().values()
            zero = 0.0 * torch.cat([each.flatten() for each in parameters]).sum()
            if isinstance(result, Tensor):
                return result + zero
            loss, *others = result
            return loss + zero, *others

        return model(*inputs, finish=finish_with_zero, **options)

    return call


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients to a norm of at most `max_norm`; return the norm before as a scalar."""
    return full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_norm))


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every worker; return any other as it is. All workers call it."""
    gather = getattr(tensor, "full_tensor", None)
    return cast("Tensor", gather()) if gather else tensor


def own_rows(full: Tensor, parameter: Any) -> Tensor:
    """Return this worker's rows of a full tensor if the parameter is sharded, else all."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return full
    shards = mesh.ndim - 1  # The dimension before it, if there is one, is that of the replicas.
    num_rows = -(-len(full) // mesh.size(shards))
    first = num_rows * mesh.get_local_rank(shards)
    return full[first : first + num_rows]


def autocast(precision: str, world: World) -> AbstractContextManager[None]:
    """Return the context of a forward pass: bf16 autocast, or nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(world.device).type, dtype=torch.bfloat16)


def mean_over_workers(values: Mapping[str, float | Tensor], world: World) -> dict[str, float]:
    """Return the mean of each number over all workers, which pass the same names in one order.

    Scalar tensors of one device are read together, so that a GPU is waited for once.
    """
    numbers = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values.values()])
    if world.size > 1:
        numbers = numbers.to(world.device)
        dist.all_reduce(numbers)
        numbers = numbers / world.size
    return dict(zip(values, numbers.tolist(), strict=True))


def gathered(value: T, world: World) -> list[T]:
    """Return the values of all workers, by rank."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def run_on_first(function: Callable[[], T], world: World) -> T:
    """Call a function on the first worker; return its result, or raise its error, on all.

    The others wait without a limit: saving, uploading or downloading may take longer than the limit
    of a collective operation, which is fixed when the group starts.
    """
    if world.size == 1:
        return function()
    store = dist.distributed_c10d._get_default_store()
    done = f"call {store.add(f'calls of {world.rank}', 1)} is done"
    box: list[tuple[T | None, Exception | None]] = [(None, None)]
    if world.is_first:
        try:
            box = [(function(), None)]
        except Exception as error:  # Raised below, on every worker.
            box = [(None, error)]
        store.set(done, "")
    while not store.check([done]):
        time.sleep(POLL_SECONDS)
    dist.broadcast_object_list(box, src=0)
    result, problem = box[0]
    if problem is not None:
        raise problem
    return cast("T", result)
