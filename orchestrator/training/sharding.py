"""Fully sharded training (FSDP2): each worker holds a shard of weights, gradients and moments.

The matrices of a layer's field are one unit, gathered once for all evaluations of the field: in the
forward pass, and again in the backward pass. All else (embeddings, head, norms, the mix) is the
root's unit, gathered once per step: 2L + 1 gathers for L layers. A method that repeats the stack
gathers the layers again in each run. With bf16, fields are sent as bf16 and gradients are summed in
float32; the root's unit stays float32, which the fused norms need.

Replicas of shards (HSDP) gather within `World.num_shards` workers, and only gradients are averaged
over all of them. Checkpoints hold full tensors, so a run can resume with another number of workers
or shards. Importing FSDP takes a second: import this late.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from iiet.decoder import Decoder
from orchestrator.training.distributed import World, own_rows


def shard(decoder: Decoder, world: World, *, precision: str) -> None:
    """Shard a decoder, in place; it may be on the meta device. Make its optimizer afterwards."""
    device = torch.device(world.device).type
    num_replicas = world.size // world.num_shards
    if num_replicas == 1:
        mesh = init_device_mesh(device, (world.size,))
    else:
        # Workers that follow each other, which are on one node where it has enough, share a model.
        names = ("replicas", "shards")
        mesh = init_device_mesh(device, (num_replicas, world.num_shards), mesh_dim_names=names)
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    # FSDP warns that views of outputs may be modified in place; ours never are.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    matrices = {p for field in decoder.fields for p in field.parameters() if p.ndim > 1}
    # A unit has one dtype. The root comes first: it would not look into layers that are units.
    fully_shard(decoder, mesh=mesh, ignored_params=matrices)
    for layer in decoder.layers:
        others = set(layer.parameters()) - matrices
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=others)


def sharded_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return this worker's shards of a full optimizer state, for `load_state_dict`.

    Of tensors that are mapped from a file, only the worker's own rows are read.
    """
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
    return DTensor.from_local(
        # Copied, because it may be mapped from a file.
        own_rows(value, parameter).to(parameter.device, copy=True),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
