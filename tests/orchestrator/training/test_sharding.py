"""What a sharded model gathers and in which precision, with a fake process group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from iiet import METHODS, Decoder, next_token_loss, preset
from orchestrator.training.distributed import World
from orchestrator.training.sharding import shard

LAYERS = 4


@pytest.fixture
def world() -> Iterator[World]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield World(rank=0, size=2, device="cpu", parallel="fsdp")
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            self.counts["gather" if "allgather" in name else "scatter"] += 1
        return function(*args, **(kwargs or {}))


def step(decoder: Decoder, precision: str) -> Counter[str]:
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with Collectives() as seen:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = next_token_loss(decoder(tokens), tokens)
        loss.backward()  # type: ignore[no-untyped-call]
    return seen.counts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["vanilla", "iiet", "pcformer"])
def test_a_layer_is_gathered_once_for_all_its_evaluations(
    world: World, method: str, checkpointing: bool
) -> None:
    decoder = Decoder(preset("tiny", method=method, num_layers=LAYERS, dim=16, ffn_dim=24))
    decoder.activation_checkpointing = checkpointing
    shard(decoder, world, precision="fp32")
    # Each layer forward and backward, and once what belongs to no layer.
    assert step(decoder, "fp32") == {"gather": 2 * LAYERS + 1, "scatter": LAYERS + 1}


@pytest.mark.parametrize("method", METHODS)
def test_with_bf16_only_fields_are_sent_as_bf16(world: World, method: str) -> None:
    decoder = Decoder(preset("tiny", method=method, num_layers=LAYERS, dim=16, ffn_dim=24))
    own = set(decoder.method_parameters())
    shard(decoder, world, precision="bf16")
    seen: dict[str, torch.dtype] = {}

    def note(module: nn.Module, prefix: str) -> None:
        for name, parameter in module.named_parameters(prefix, recurse=False):
            seen[name] = parameter.dtype

    for prefix, module in decoder.named_modules():
        module.register_forward_pre_hook(lambda module, _, prefix=prefix: note(module, prefix))
    step(decoder, "bf16")
    assert own <= set(seen)
    for name, dtype in seen.items():
        expected = torch.bfloat16 if ".field." in name else torch.float32
        assert dtype == expected, name
