"""Compiled fields give the losses of plain ones, with one graph for all schedules."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from iiet import Decoder, IterationSchedule, next_token_loss, preset
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.compiling import compile_fields
from orchestrator.training.job import job_key
from orchestrator.training.run import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import read_journal


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
        for compiled in (False, True)
    ]


def losses(job: TrainingJob) -> list[float]:
    values = [record.get("values", {}) for record in read_journal(job.folder)[0]]
    return [v[name] for v in values for name in ("train/loss", "validation/loss") if name in v]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # The compiler warns of itself.
def test_compiled_fields_give_the_losses_of_plain_ones(jobs: list[TrainingJob]) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for job in jobs:
        run_job(job)
    assert losses(jobs[1]) == pytest.approx(losses(jobs[0]), abs=1e-5)
    # Of training and of validation; each serves every layer, evaluation and schedule.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Read by the compiler.
def test_one_graph_serves_all_layers_schedules_and_lists_of_estimates() -> None:
    """At 24 layers and at 30: one graph of a training step, one of a validation step."""
    torch.compiler.reset()
    graphs = CompileCounter()
    ids = torch.randint(13, (2, 8))

    def train(decoder: Decoder, schedule: IterationSchedule, **mask: torch.Tensor) -> None:
        next_token_loss(decoder(ids, schedule=schedule, **mask), ids).backward()

    def validate(decoder: Decoder, schedule: IterationSchedule) -> None:
        with torch.inference_mode():
            decoder(ids, schedule=schedule)

    deep, deeper = (tiny_decoder(num_layers) for num_layers in (24, 30))
    for decoder in (deep, deeper):
        compile_fields(decoder, backend=graphs)
    train(deep, IterationSchedule.none(24))
    assert graphs.frame_count == 1
    train(deep, IterationSchedule.ramp(24, 3, 0))
    train(deeper, IterationSchedule.uniform(30, 1))
    assert graphs.frame_count == 1
    validate(deep, IterationSchedule.uniform(24, 1))
    validate(deeper, IterationSchedule.none(30))
    assert graphs.frame_count == 2
    deep.activation_checkpointing = True
    train(deep, IterationSchedule.uniform(24, 1))
    assert graphs.frame_count == 2
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 0] = False
    train(deep, IterationSchedule.uniform(24, 1), attention_mask=mask)
    train(deep, IterationSchedule.none(24), attention_mask=mask)
    assert graphs.frame_count == 3
    assert not torch._dynamo.utils.counters["graph_break"]


def tiny_decoder(num_layers: int) -> Decoder:
    sizes = {"dim": 8, "num_heads": 2, "ffn_dim": 12, "vocab_size": 13, "context_length": 8}
    return Decoder(preset("tiny", num_layers=num_layers, **sizes))


def test_without_a_compiler_a_run_does_not_start(
    jobs: list[TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job_key(jobs[0]) == job_key(jobs[1])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "")
    with pytest.raises(UserError, match=r"training.compile=true needs a C\+\+ compiler"):
        run_job(jobs[1])
    assert not jobs[1].folder.exists()
