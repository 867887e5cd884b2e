"""What a sharded model gathers, reduces and holds, with a fake process group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from live_tensors import LiveStorages
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from iiet import METHODS, Decoder, next_token_loss, preset
from orchestrator.planning.training_memory import training_memory
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.devices import (
    World,
    autocast,
    compile_fields,
    decoder_to_train,
    pass_of_several,
    shard,
)

LAYERS = 4


@pytest.fixture
def world() -> Iterator[World]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield World(rank=0, size=2, device="cpu", parallel="fsdp")
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts the collectives of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            kinds = ("allgather", "reduce_scatter", "allreduce")
            self.counts[next(kind for kind in kinds if kind in name)] += 1
        return function(*args, **(kwargs or {}))


def make_decoder(method: str = "iiet", **sizes: Any) -> Decoder:
    return Decoder(preset("tiny", **{"num_layers": LAYERS, "dim": 16, "ffn_dim": 24, **sizes},
                          method=method))  # fmt: skip


def step(decoder: Decoder, world: World, precision: str, num_passes: int = 1) -> Counter[str]:
    tokens = torch.zeros(1, decoder.config.context_length, dtype=torch.long)
    with Collectives() as seen:
        for number in range(num_passes):
            several = pass_of_several(decoder, world, is_last=number == num_passes - 1)
            with several if num_passes > 1 else nullcontext():
                with autocast(precision, world):
                    loss = decoder(tokens, finish=partial(next_token_loss, input_ids=tokens))
                loss.backward()  # type: ignore[no-untyped-call]
    return seen.counts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_gathered_once_for_all_its_evaluations(
    world: World, method: str, precision: str, checkpointing: bool
) -> None:
    decoder = make_decoder(method)
    decoder.activation_checkpointing = checkpointing
    shard(decoder, world, precision=precision)
    num_runs = decoder.method.num_runs(decoder.schedule)
    for _ in range(2):
        # Each layer forward and backward, in each run of the stack, and once what belongs to none.
        counts = step(decoder, world, precision)
        assert counts == {"allgather": 2 * num_runs * LAYERS + 1, "reduce_scatter": LAYERS + 1}


@pytest.mark.slow
def test_compiled_fields_are_one_graph_and_gathered_as_often(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, graphs, gathers = make_decoder(), [], []
    # Its name before PyTorch renamed it.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather = getattr(dist, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        gathers.append(1)
        return gather(*arguments, **options)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    monkeypatch.setattr(dist, name, counted)
    torch._dynamo.reset()
    shard(decoder, world, precision="bf16")
    compile_fields(decoder, lambda *_, **__: None, backend)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    for _ in range(2):  # Not `step`: nothing is compiled while operations are counted.
        with autocast("bf16", world):
            loss = next_token_loss(decoder(tokens), tokens)
        loss.backward()  # type: ignore[no-untyped-call]
    assert len(graphs) == 1
    assert len(gathers) == 2 * (2 * LAYERS + 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_passes_of_a_step_gather_once_together(world: World, precision: str) -> None:
    decoder = make_decoder()
    shard(decoder, world, precision=precision)
    for _ in range(2):
        counts = step(decoder, world, precision, num_passes=3)
        # Weights are kept between the passes, gradients are not.
        assert counts == {"allgather": LAYERS + 1, "reduce_scatter": 3 * (LAYERS + 1)}
        assert all(isinstance(p, DTensor) for p in decoder.parameters())
    # Validation and a step of one pass gather as if there had been no passes.
    with torch.no_grad(), autocast(precision, world), Collectives() as seen:
        decoder(torch.zeros(1, 8, dtype=torch.long))
    assert seen.counts == {"allgather": LAYERS + 1}
    assert step(decoder, world, precision)["allgather"] == 2 * LAYERS


def test_replicas_of_shards_average_gradients_in_the_last_pass_only() -> None:
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        world = World(rank=0, size=4, parallel="fsdp", shards=2)
        decoder = make_decoder()
        shard(decoder, world, precision="fp32")
        expected = {"allgather": LAYERS + 1, "reduce_scatter": 3 * (LAYERS + 1)}
        for _ in range(2):
            counts = step(decoder, world, "fp32", num_passes=3)
            assert counts == {**expected, "allreduce": LAYERS + 1}
        weight = decoder.embedding.weight
        assert isinstance(weight, DTensor)
        assert len(weight.to_local()) == len(weight) // 2
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_with_bf16_only_matrices_of_fields_are_sent_as_bf16(world: World, method: str) -> None:
    decoder = make_decoder(method)
    shard(decoder, world, precision="bf16")
    seen: dict[str, torch.dtype] = {}

    def note(module: nn.Module, prefix: str) -> None:
        for name, parameter in module.named_parameters(prefix, recurse=False):
            seen[name] = parameter.dtype

    for prefix, module in decoder.named_modules():
        module.register_forward_pre_hook(lambda module, _, prefix=prefix: note(module, prefix))
    step(decoder, world, "bf16")
    assert seen.keys() == dict(decoder.named_parameters()).keys()
    for name, dtype in seen.items():
        is_matrix = ".field." in name and "norm" not in name
        assert dtype == (torch.bfloat16 if is_matrix else torch.float32), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_passes", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_planned_memory_is_that_of_a_step(
    precision: Literal["fp32", "bf16"], num_passes: int, checkpointing: bool
) -> None:
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        world = World(rank=0, size=8, parallel="fsdp")
        decoder = make_decoder(num_layers=6, dim=256, ffn_dim=700, vocab_size=2048,
                               context_length=64, schedule=1)  # fmt: skip
        decoder.activation_checkpointing = checkpointing
        shard(decoder, world, precision=precision)
        with LiveStorages() as live:
            step(decoder, world, precision, num_passes)
    finally:
        dist.destroy_process_group()
    plan = training_memory(
        decoder.config,
        num_sequences=1,
        precision=precision,
        activation_checkpointing=checkpointing,
        num_shards=8,
        num_passes=num_passes,
    )
    # The plan counts gradients from the first pass on, and here they grow while activations go.
    assert live.peak < plan.total - plan.optimizer < 1.5 * live.peak


@pytest.mark.parametrize("num_shards", [2, 3])
def test_a_shard_is_drawn_and_loaded_as_its_rows_of_the_whole_model(
    num_shards: int, tmp_path: Path
) -> None:
    config = preset("tiny", vocab_size=7, num_layers=2, dim=20, num_heads=2, ffn_dim=24)
    new = TrainingJob(
        run_folder=str(tmp_path / "run"), tokens_folder="", model=config, recipe=TrainingSettings()
    )
    loaded = new.model_copy(update={"initial_folder": str(tmp_path / "initial")})
    Decoder(config).save(tmp_path / "initial")
    for job in (new, loaded):
        whole = decoder_to_train(job, World(), None).state_dict()
        random_state = torch.get_rng_state()
        for rank in range(num_shards):
            dist.init_process_group("fake", rank=rank, world_size=num_shards, store=FakeStore())
            try:
                world = World(rank=rank, size=num_shards, parallel="fsdp")
                decoder = decoder_to_train(job, world, None)
                assert torch.equal(torch.get_rng_state(), random_state)
                for name, parameter in decoder.named_parameters():
                    assert isinstance(parameter, DTensor)
                    expected = list(whole[name].chunk(num_shards))
                    expected += [whole[name][:0]] * (num_shards - len(expected))
                    assert torch.equal(parameter.to_local(), expected[rank]), name
            finally:
                dist.destroy_process_group()
