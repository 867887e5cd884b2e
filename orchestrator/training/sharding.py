"""Fully sharded training (FSDP2): each worker holds a shard of weights, gradients and moments.

A layer's weights are gathered once for all evaluations of its field. With bf16, fields are sent as
bf16 and gradients are summed in float32; all else stays float32. Checkpoints hold full tensors, so
a run can resume with another number of workers. Importing FSDP takes a second: import this late.
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
    """Shard a decoder over all workers, in place. Make its optimizer afterwards."""
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    # FSDP warns that views of outputs may be modified in place; ours never are.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    for layer in decoder.layers:
        if precision == "bf16":
            for name, module in layer.named_children():
                if name != "field":
                    fully_shard(module, mesh=mesh, reshard_after_forward=False)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(decoder, mesh=mesh)


def sharded_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return this worker's shards of a full optimizer state, for `load_state_dict`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shards = {
        number: {name: _like(value, parameters[number]) for name, value in moments.items()}
        for number, moments in state["state"].items()
    }
    return {**state, "state": shards}


def _like(value: Any, parameter: Tensor) -> Any:
    # Only moments have the shape of their parameter; the step count is a scalar.
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
