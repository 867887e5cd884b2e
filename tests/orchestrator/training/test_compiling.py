"""Compiled fields give the losses of plain ones, with one graph for all schedules."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.testing._internal.distributed.fake_pg import FakeStore

from iiet import Decoder, IterationSchedule, next_token_loss, preset
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.devices import World, autocast, compile_fields, shard
from orchestrator.training.job import job_key
from orchestrator.training.trainer import run_job
from orchestrator.workspace.journal import read_journal


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def jobs(tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]) -> list[TrainingJob]:
    """The same run plain and compiled: one step without corrections, then a ramp to all."""
    recipe = {
        "num_steps": 6,
        "num_tokens_per_step": 64,
        "num_validation_tokens": 64,
        "learning_rate": 1e-2,
        "iterate_from_fraction": 0.2,
        "iterate_ramp_fraction": 0.5,
    }
    return [
        TrainingJob(
            run_folder=str(tmp_path / f"compile-{compiled}"),
            tokens_folder=str(tiny_tokens),
            model={**tiny_model, "schedule": [2, 1]},
            recipe=TrainingSettings(**recipe, compile=compiled),
        )
        for compiled in (None, True)
    ]


def losses(job: TrainingJob) -> list[float]:
    values = [record.get("values", {}) for record in read_journal(job.folder)[0]]
    return [v[name] for v in values for name in ("train/loss", "validation/loss") if name in v]


def events(job: TrainingJob, name: str) -> list[dict[str, Any]]:
    return [record for record in read_journal(job.folder)[0] if record.get("name") == name]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # The compiler warns of itself.
def test_compiled_fields_give_the_losses_of_plain_ones(jobs: list[TrainingJob]) -> None:
    for job in jobs:
        run_job(job)
    assert losses(jobs[1]) == pytest.approx(losses(jobs[0]), abs=1e-5)
    # It serves every layer, evaluation and schedule; validation runs as it is.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    # The default compiles nothing on a CPU.
    assert [len(events(job, "compiled")) for job in jobs] == [0, 1]
    assert events(jobs[1], "compiled")[0]["seconds"] > 0


def broken_compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    raise OSError("no space\nleft for the compiler")


def test_a_broken_compiler_is_one_warning_and_changes_nothing(
    jobs: list[TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_badly(decoder: Decoder, event: Callable[..., None]) -> None:
        compile_fields(decoder, event, backend=broken_compiler)

    monkeypatch.setattr("orchestrator.training.trainer.compile_fields", compile_badly)
    for job in jobs:
        run_job(job)
    assert losses(jobs[1]) == losses(jobs[0])
    (event,) = events(jobs[1], "not compiled")
    assert event["text"].endswith("OSError: no space left for the compiler")


def test_every_training_of_a_process_compiles() -> None:
    """Tune reuses a process for its trials; Dynamo keeps graphs for 8 backends, here for 2."""
    found: list[str] = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(3):
            decoder = tiny_decoder(1)
            compile_fields(decoder, lambda name, **_: found.append(name), backend="eager")
            decoder(torch.zeros(2, 8, dtype=torch.long))
    assert found == ["compiled"] * 3


def test_the_limit_of_graphs_is_one_event_and_changes_nothing() -> None:
    found: list[Any] = []
    plain, decoder = tiny_decoder(2), tiny_decoder(2)
    decoder.load_state_dict(plain.state_dict())
    compile_fields(decoder, lambda *event, **details: found.append((*event, details)), "eager")
    ids, mask = torch.randint(13, (2, 8)), torch.ones(2, 8, dtype=torch.bool)
    mask[0, 0] = False
    with torch._dynamo.config.patch(recompile_limit=1):
        for masks in ({}, {"attention_mask": mask}) * 2:
            torch.testing.assert_close(decoder(ids, **masks), plain(ids, **masks))
    (compiled, _), (limited, details) = found
    assert (compiled, limited) == ("compiled", "not compiled")
    assert "more compiled graphs than PyTorch keeps" in details["text"]


def test_other_errors_are_not_taken_for_a_failure_of_the_compiler() -> None:
    def out_of_memory(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    decoder, found = tiny_decoder(2), []
    compile_fields(decoder, lambda name, **_: found.append(name), backend=lambda *_: out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        decoder(torch.randint(13, (2, 8)))
    assert found == ["compiled"]


def test_one_graph_serves_all_layers_schedules_and_lists_of_estimates() -> None:
    """At 24 layers and at 30: one graph of a training step."""
    graphs = CompileCounter()
    ids = torch.randint(13, (2, 8))

    def train(decoder: Decoder, schedule: IterationSchedule, **mask: torch.Tensor) -> None:
        next_token_loss(decoder(ids, schedule=schedule, **mask), ids).backward()

    deep, deeper = (tiny_decoder(num_layers) for num_layers in (24, 30))
    both: Any = SimpleNamespace(fields=[*deep.fields, *deeper.fields])
    compile_fields(both, lambda *_, **__: None, graphs)
    train(deep, IterationSchedule.none(24))
    assert graphs.frame_count == 1
    train(deep, IterationSchedule.ramp(24, 3, 0))
    train(deeper, IterationSchedule.uniform(30, 1))
    with torch.inference_mode():
        deep(ids, schedule=IterationSchedule.uniform(24, 1))
    assert graphs.frame_count == 1
    deep.activation_checkpointing = True
    train(deep, IterationSchedule.uniform(24, 1))
    assert graphs.frame_count == 1
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 0] = False
    train(deep, IterationSchedule.uniform(24, 1), attention_mask=mask)
    train(deep, IterationSchedule.none(24), attention_mask=mask)
    assert graphs.frame_count == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def tiny_decoder(num_layers: int) -> Decoder:
    sizes = {"dim": 8, "num_heads": 2, "ffn_dim": 12, "vocab_size": 13, "context_length": 8}
    return Decoder(preset("tiny", num_layers=num_layers, **sizes))


def test_compilation_is_no_part_of_the_key(jobs: list[TrainingJob]) -> None:
    assert job_key(jobs[0]) == job_key(jobs[1])


def test_sharded_fields_compile_to_one_graph_between_the_hooks() -> None:
    found: list[str] = []
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        world = World(rank=0, size=2, device="cpu", parallel="fsdp")
        decoder = tiny_decoder(3)
        shard(decoder, world, precision="bf16")
        compile_fields(decoder, lambda name, **_: found.append(name), backend="aot_eager")
        ids = torch.zeros(2, 8, dtype=torch.long)
        for _ in range(2):
            with autocast("bf16", world):
                loss = next_token_loss(decoder(ids), ids)
            loss.backward()
    finally:
        dist.destroy_process_group()
    assert found == ["compiled"]
    assert not torch._dynamo.utils.counters["graph_break"]
