"""Fully sharded training: each worker holds its share of weights, gradients and moments (FSDP2).

PyTorch's `fully_shard` gathers a layer's weights once for all evaluations of its field, and
scatters their gradients once after its backward pass; what belongs to no layer (embedding, norm,
head) is one more group. With bf16, fields travel as bf16, half as many bytes, and gradients are
summed in float32; embedding, mix and the method's norms stay float32, as they do in one process:
they are small groups of their own then. Autocast decides the arithmetic in both cases.

Checkpoints hold whole tensors in the order of an unsharded optimizer, so a run may go on with
another number of workers, sharded or not. This module is imported only where it is used: FSDP takes
a second to load.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from iiet.decoder import Decoder
from orchestrator.training.distributed import World


def shard(decoder: Decoder, world: World, *, precision: str) -> None:
    """Share a decoder among all workers, in place; its optimizer is made afterwards.

    Args:
        decoder: The same weights on every worker, on its device.
        world: This worker's place.
        precision: `fp32`, or `bf16` for fields that travel as bf16.
    """
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    # What layers return is never written to in place, of which FSDP warns for each view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    for layer in decoder.layers:
        if precision == "bf16":
            for name, module in layer.named_children():
                if name != "field":
                    fully_shard(module, mesh=mesh, reshard_after_forward=False)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(decoder, mesh=mesh)


def sharded_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's whole state as the shards of this worker, for `load_state_dict`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shards = {
        number: {name: _like(value, parameters[number]) for name, value in moments.items()}
        for number, moments in state["state"].items()
    }
    return {**state, "state": shards}


def _like(value: Any, parameter: Tensor) -> Any:
    # Moments have their parameter's shape; the count of steps is a number on its own.
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
