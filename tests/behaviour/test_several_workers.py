"""Two workers, replicated or sharded, have the losses of one, also after a resume as the other;
so have three that cannot share a step evenly, and two copies of a model in two shards each."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from iiet.batch import Batch
from orchestrator.data.store import TokenStore
from orchestrator.models.open import load_model
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training import trainer as run_module
from orchestrator.training.checkpoint import load_training_state
from orchestrator.training.devices import World
from orchestrator.training.trainer import run_job
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints

RECIPE = {
    "num_steps": 8,
    "num_tokens_per_step": 64,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "validate_every_steps": 3,
    "num_validation_tokens": 16 * 5,
    "checkpoint_every_steps": 4,
    "iterate_from_fraction": 0.5,
}
HALF = 5

Call = tuple[dict[str, Any], str, int | None]
"""A job, how its workers share the model, and the step to stop after."""

BAD_STEP, BAD_RUNS = 3, ("ddp-bad", "fsdp-bad")
"""In these runs the second worker's loss is NaN at one step."""


def stop_after(step: int | None) -> Callable[[], bool]:
    asked = iter(range(10**6))
    return lambda: next(asked) == step


def spoiled(make_objective: Callable[..., Any]) -> Callable[..., Any]:
    def spoil(*arguments: Any) -> Any:
        inner = make_objective(*arguments)

        def compute(model: Any, batch: Any, step: int) -> Any:
            loss, parts = inner(model, batch, step)
            return (loss * math.nan if step == BAD_STEP else loss), parts

        return compute

    return spoil


def completions_only(batch: Callable[..., Batch]) -> Callable[..., Batch]:
    """Let only some tokens count, with other numbers of them in each worker and pass."""

    def masked(*arguments: Any, **options: Any) -> Batch:
        tokens = batch(*arguments, **options).input_ids
        return Batch.of_text(tokens, tokens > tokens[:, :1])

    return masked


def run_calls(rank: int, folder: str, calls: list[Call], num_workers: int) -> None:
    """Run jobs one after the other as one of several workers; started by `mp.spawn`."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{num_workers}", rank=rank, world_size=num_workers
    )
    objective, batch = run_module.make_objective, TokenStore.batch
    for job, parallel, step in calls:
        is_bad = rank == 1 and job["run_folder"].endswith("-bad")
        run_module.make_objective = spoiled(objective) if is_bad else objective
        is_masked = job["run_folder"].endswith("-masked")
        TokenStore.batch = completions_only(batch) if is_masked else batch
        shards = 2 if parallel == "hsdp" else None
        parallel = parallel.replace("hsdp", "fsdp")
        world = World(rank=rank, size=num_workers, parallel=parallel, shards=shards)
        run_job(TrainingJob.model_validate(job), world=world, should_stop=stop_after(step))
    torch.distributed.destroy_process_group()


class Runs:
    """The jobs of this file by name, in one folder."""

    def __init__(self, folder: Path, tokens: Path, model: dict[str, Any]) -> None:
        self.folder, self.tokens, self.model = folder, tokens, model

    def job(self, name: str, **recipe: Any) -> TrainingJob:
        # The loss reads the head's weight; gradients of an own one go another way.
        is_tied = not name.endswith("-untied")
        return TrainingJob(
            run_folder=str(self.folder / name),
            tokens_folder=str(self.tokens),
            model=self.model | {"tie_embeddings": is_tied},
            recipe=TrainingSettings(**{**RECIPE, **recipe}),
        )

    def numbers(self, name: str, metric: str = "train/loss") -> list[float]:
        found = {
            record["step"]: record["values"][metric]
            for record in read_journal(self.folder / name)[0]
            if metric in record.get("values", {})
        }
        return [found[step] for step in sorted(found)]


ELASTIC: dict[str, Any] = {"elastic": {"schedules": ["2,0", "1,1", "0,0"]}}
"""Members use fewer parameters than the full schedule, which comes first."""
TWICE: dict[str, Any] = {"num_tokens_per_step": 2 * 64}
HSDP: dict[str, dict[str, Any]] = {
    "hsdp": {},
    "hsdp-passes": {**TWICE, "num_sequences_per_pass": 1},
    "hsdp-elastic": {**TWICE, **ELASTIC, "num_sequences_per_pass": 1},
    "alone-then-hsdp": {},
}
"""Runs of copies of shards, and their recipes."""
MIDDLE = ("alone-then-ddp", "alone-then-fsdp", "ddp-then-alone", "fsdp-then-alone",
          "ddp-then-fsdp", "fsdp-then-ddp")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokens: Path) -> Runs:
    """All runs of this file, made by two workers that start once."""
    from iiet.config import ModelConfig
    from iiet.schedule import IterationSchedule

    folder = tmp_path_factory.mktemp("workers")
    model = ModelConfig(vocab_size=300, dim=16, num_layers=2, num_heads=2, num_kv_heads=2,
                        ffn_dim=32, context_length=16,
                        schedule=IterationSchedule((2, 1))).to_dict()  # fmt: skip
    runs = Runs(folder, tiny_tokens, model)
    calls: list[Call] = []

    def call(name: str, parallel: str, step: int | None = None, **recipe: Any) -> None:
        calls.append((runs.job(name, **recipe).model_dump(mode="json"), parallel, step))

    for parallel in ("ddp", "fsdp"):
        call(parallel, parallel)
        call(f"{parallel}-passes", parallel, num_sequences_per_pass=1)
        call(f"{parallel}-lean", parallel, activation_checkpointing=True)
        call(f"{parallel}-bf16", parallel, precision="bf16")
        call(f"{parallel}-masked", parallel, num_sequences_per_pass=1)
        call(f"{parallel}-untied", parallel)
        call(f"{parallel}-elastic", parallel, **ELASTIC)
    for name in BAD_RUNS:
        call(name, name.removesuffix("-bad"), skip_bad_steps=1)
    run_job(runs.job("alone"))
    run_job(runs.job("alone-untied"))
    run_job(runs.job("alone-elastic", **ELASTIC))
    run_job(runs.job("alone-bf16", precision="bf16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenStore, "batch", completions_only(TokenStore.batch))
        run_job(runs.job("alone-masked"))
    for name in MIDDLE:
        first, second = name.split("-then-")
        if first == "alone":
            run_job(runs.job(name), should_stop=stop_after(HALF))
        else:
            call(name, first, HALF)
        if second != "alone":
            call(name, second)
    mp.spawn(run_calls, (str(folder), calls, 2), nprocs=2)
    calls.clear()
    call("uneven", "ddp")
    call("uneven-passes", "ddp", num_sequences_per_pass=1)
    call("uneven-masked", "ddp", num_sequences_per_pass=1)
    mp.spawn(run_calls, (str(folder), calls, 3), nprocs=3)
    for name in MIDDLE:
        if name.endswith("-alone"):
            run_job(runs.job(name))
    return runs


@pytest.fixture(scope="module")
def copies_of_shards(runs: Runs) -> Runs:
    """Runs of four workers, two for each copy of the model."""
    calls: list[Call] = []
    for name, recipe in HSDP.items():
        calls.append((runs.job(name, **recipe).model_dump(mode="json"), "hsdp", None))
    run_job(runs.job("alone-then-hsdp"), should_stop=stop_after(HALF))
    calls.append((runs.job("hsdp-then-alone").model_dump(mode="json"), "hsdp", HALF))
    mp.spawn(run_calls, (str(runs.folder), calls, 4), nprocs=4)
    run_job(runs.job("hsdp-then-alone"))
    run_job(runs.job("alone-twice", **TWICE))
    run_job(runs.job("alone-twice-elastic", **TWICE, **ELASTIC))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", [*HSDP, "hsdp-then-alone"])
def test_copies_of_shards_have_the_losses_of_one_worker(copies_of_shards: Runs, name: str) -> None:
    runs = copies_of_shards
    of_one = {"hsdp-passes": "alone-twice", "hsdp-elastic": "alone-twice-elastic"}
    alone = of_one.get(name, "alone")
    for metric in ("train/loss", "validation/loss", "train/gradient_norm", "train/tokens"):
        expected = pytest.approx(runs.numbers(alone, metric), rel=1e-4, abs=1e-5)
        assert runs.numbers(name, metric) == expected
    events = [r for r in read_journal(runs.folder / name)[0] if r.get("num_shards") == 2]
    assert [(r["num_workers"], r["parallel"]) for r in events] == [(4, "fsdp")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [parallel + kind for parallel in ("ddp", "fsdp") for kind in ("", "-passes", "-lean")]
    + ["uneven", "uneven-passes"],
)
def test_several_workers_have_the_losses_of_one(runs: Runs, name: str) -> None:
    for metric in ("train/loss", "validation/loss", "train/gradient_norm", "train/tokens"):
        expected = pytest.approx(runs.numbers("alone", metric), rel=1e-4, abs=1e-5)
        assert runs.numbers(name, metric) == expected
    weights, alone = (
        load_model(find_checkpoints(runs.folder / run)[-1]).state_dict() for run in (name, "alone")
    )
    for key in alone:
        assert torch.allclose(weights[key], alone[key], atol=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["untied", "elastic"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_head_of_its_own_and_elastic_weights_are_trained_alike(
    runs: Runs, parallel: str, kind: str
) -> None:
    for metric in ("train/loss", "validation/loss", "train/gradient_norm", "train/flops"):
        expected = pytest.approx(runs.numbers(f"alone-{kind}", metric), rel=1e-4, abs=1e-5)
        assert runs.numbers(f"{parallel}-{kind}", metric) == expected


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "uneven"])
def test_every_target_has_the_same_weight_on_any_worker(runs: Runs, parallel: str) -> None:
    for metric in ("train/loss", "train/gradient_norm"):
        expected = runs.numbers("alone-masked", metric)
        assert runs.numbers(f"{parallel}-masked", metric) == pytest.approx(expected, rel=1e-4)
        assert expected != pytest.approx(runs.numbers("alone", metric), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bf16_of_two_workers_is_close_to_that_of_one(runs: Runs, parallel: str) -> None:
    found = runs.numbers(f"{parallel}-bf16")
    assert found == pytest.approx(runs.numbers("alone-bf16"), abs=0.03)
    assert found == pytest.approx(runs.numbers("alone"), abs=0.1)
    weights = load_model(find_checkpoints(runs.folder / f"{parallel}-bf16")[-1]).state_dict()
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_nan_loss_on_one_worker_is_skipped_by_both(runs: Runs, name: str) -> None:
    assert runs.numbers(name)[:3] == pytest.approx(runs.numbers("alone")[:3], abs=1e-5)
    assert len(runs.numbers(name)) == RECIPE["num_steps"] - 1
    skipped = [r["step"] for r in read_journal(runs.folder / name)[0] if r.get("name") == "skipped"]
    assert skipped == [BAD_STEP + 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", MIDDLE)
def test_a_run_resumes_with_other_workers(runs: Runs, name: str) -> None:
    assert runs.numbers(name) == pytest.approx(runs.numbers("alone"), abs=1e-5)
    events = [r for r in read_journal(runs.folder / name)[0] if r["kind"] == "event"]
    (resumed,) = [r for r in events if r["name"] == "resumed"]
    assert resumed["step"] == HALF
    assert resumed["num_workers"] == (1 if name.endswith("-alone") else 2)


@pytest.mark.slow
def test_a_sharded_run_saves_what_an_unsharded_one_saves(runs: Runs) -> None:
    states = [
        load_training_state(find_checkpoints(runs.folder / name)[0]) for name in ("alone", "fsdp")
    ]
    moments = [state["optimizer"]["state"] for state in states]
    assert moments[0].keys() == moments[1].keys()
    for number, moment in moments[0].items():
        for name, value in moment.items():
            other = moments[1][number][name]
            assert type(other) is torch.Tensor
            assert torch.allclose(value, other, atol=1e-6), (number, name)
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]
