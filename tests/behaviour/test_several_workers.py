"""Two workers, replicated or sharded, have the losses of one, also after a resume as the other;
so have three that cannot share a step evenly, and two copies of a model in two shards each.

A run's name says who trains it and how: `fsdp-elastic`, `ddp-then-alone`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_workers

from iiet.batch import Batch
from iiet.config import ModelConfig
from iiet.schedule import IterationSchedule
from orchestrator.data.store import TokenStore
from orchestrator.models.open import load_model
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training import trainer as run_module
from orchestrator.training.checkpoint import load_training_state
from orchestrator.training.trainer import run_job
from orchestrator.training.world import World
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints

pytestmark = pytest.mark.slow

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
HALF, BAD_STEP = 5, 3
ELASTIC: dict[str, Any] = {"elastic": {"schedules": ["2,0", "1,1", "0,0"]}}
"""Members use fewer parameters than the full schedule, which comes first."""
KINDS: dict[str, dict[str, Any]] = {
    "lean": {"activation_checkpointing": True},
    "bf16": {"precision": "bf16"},
    "masked": {"num_sequences_per_pass": 1},
    "untied": {},  # The loss reads the head's weight; gradients of an own one go another way.
    "elastic": ELASTIC,
    "bad": {"skip_bad_steps": 1},  # The second worker's loss is NaN at one step.
    "twice_elastic": {"num_tokens_per_step": 2 * 64, **ELASTIC},
}
WORKERS = {"alone": 1, "ddp": 2, "fsdp": 2, "uneven": 3, "hsdp": 4}
NAMES = {
    2: ["ddp", *(f"ddp-{kind}" for kind in ("bf16", "masked", "elastic", "bad")),
        "fsdp", *(f"fsdp-{kind}" for kind in KINDS if kind != "twice_elastic"),
        "alone-then-fsdp", "ddp-then-alone", "fsdp-then-ddp"],
    3: ["uneven", "uneven-masked"],
    4: ["hsdp-twice_elastic", "alone-then-hsdp", "hsdp-then-alone"],
}  # fmt: skip
ALL = [name for names in NAMES.values() for name in names]
OWN_LOSSES = ("bf16", "masked", "untied", "elastic", "twice_elastic")
"""Kinds whose losses are not those of the plain recipe."""


def parts(name: str) -> tuple[list[str], str]:
    """Return who trains a run, one after the other, and its kind."""
    who, _, kind = name.partition("-")
    return (name.split("-then-"), "") if "-then-" in name else ([who], kind)


def stop_after(step: int | None) -> Callable[[], bool]:
    asked = iter(range(10**6))
    return lambda: next(asked) == step


def spoiled(make_objective: Callable[..., Any]) -> Callable[..., Any]:
    def spoil(*arguments: Any) -> Any:
        inner = make_objective(*arguments)

        def compute(model: Any, batch: Any, step: int) -> Any:
            loss, found = inner(model, batch, step)
            return (loss * math.nan if step == BAD_STEP else loss), found

        return compute

    return spoil


def completions_only(batch: Callable[..., Batch]) -> Callable[..., Batch]:
    """Let only some tokens count, with other numbers of them in each worker and pass."""

    def masked(*arguments: Any, **options: Any) -> Batch:
        tokens = batch(*arguments, **options).input_ids
        return Batch.of_text(tokens, tokens > tokens[:, :1])

    return masked


class Runs:
    """The jobs of this file by name, in one folder."""

    def __init__(self, folder: Path, tokens: Path) -> None:
        self.folder, self.tokens = folder, tokens

    def job(self, name: str) -> TrainingJob:
        _, kind = parts(name)
        model = ModelConfig(
            vocab_size=300, dim=16, num_layers=2, num_heads=2, num_kv_heads=2, ffn_dim=32,
            context_length=16, schedule=IterationSchedule((2, 1)), tie_embeddings=kind != "untied",
        )  # fmt: skip
        return TrainingJob(
            run_folder=str(self.folder / name),
            tokens_folder=str(self.tokens),
            model=model,
            recipe=TrainingSettings(**{**RECIPE, **KINDS.get(kind, {})}),
        )

    def train(self, name: str, who: str, *, rank: int = 0) -> None:
        """Train a run as one of its workers, up to the half if others go on."""
        everyone, kind = parts(name)
        is_over = everyone[-1] == who
        world = World(
            rank=rank,
            size=WORKERS[who],
            parallel="fsdp" if who in ("fsdp", "hsdp") else "ddp",
            shards=2 if who == "hsdp" else None,
        )
        with pytest.MonkeyPatch.context() as patch:
            if kind == "bad" and rank:
                patch.setattr(run_module, "make_objective", spoiled(run_module.make_objective))
            if kind == "masked":
                patch.setattr(TokenStore, "batch", completions_only(TokenStore.batch))
            run_job(self.job(name), world=world, should_stop=stop_after(None if is_over else HALF))

    def numbers(self, name: str, metric: str = "train/loss") -> list[float]:
        found = {
            record["step"]: record["values"][metric]
            for record in read_journal(self.folder / name)[0]
            if metric in record.get("values", {})
        }
        return [found[step] for step in sorted(found)]

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        return [r for r in read_journal(self.folder / name)[0] if r.get("name") == event]


WORKER = "import test_several_workers as tests; tests.work()"


def work() -> None:
    """Train runs one after the other as one of several workers."""
    rank, number, folder, tokens, names = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    address = {"init_method": f"file://{folder}/{number}", "world_size": int(number)}
    torch.distributed.init_process_group("gloo", **address, rank=int(rank))
    runs = Runs(Path(folder), Path(tokens))
    for name in json.loads(names):
        for who in parts(name)[0]:
            if WORKERS[who] == int(number):
                runs.train(name, who, rank=int(rank))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokens: Path) -> Runs:
    """All runs of this file; workers are started once for each number of them."""
    runs = Runs(tmp_path_factory.mktemp("workers"), tiny_tokens)
    for name in ("alone", *(f"alone-{kind}" for kind in OWN_LOSSES)):
        runs.train(name, "alone")
    for name in (name for name in ALL if name.startswith("alone-then-")):
        runs.train(name, "alone")
    for number, names in NAMES.items():
        arguments = (str(number), str(runs.folder), str(runs.tokens), json.dumps(names))
        run_workers(WORKER, number, *arguments)
    for name in (name for name in ALL if name.endswith("-then-alone")):
        runs.train(name, "alone")
    return runs


@pytest.mark.parametrize("name", [name for name in ALL if parts(name)[1] not in ("bf16", "bad")])
def test_several_workers_have_the_losses_of_one(runs: Runs, name: str) -> None:
    everyone, kind = parts(name)
    alone = f"alone-{kind}" if kind in OWN_LOSSES else "alone"
    for metric in ("train/loss", "validation/loss", "train/gradient_norm", "train/tokens"):
        expected = pytest.approx(runs.numbers(alone, metric), rel=1e-4, abs=1e-5)
        assert runs.numbers(name, metric) == expected
    assert runs.numbers(name, "train/flops") == runs.numbers(alone, "train/flops")
    if kind == "masked":
        assert runs.numbers(alone) != pytest.approx(runs.numbers("alone"), rel=1e-2)
    starts = [*runs.events(name, "started"), *runs.events(name, "resumed")]
    assert [start["num_workers"] for start in starts] == [WORKERS[who] for who in everyone]
    assert [start["step"] for start in starts[1:]] == [HALF] * (len(everyone) - 1)
    weights, expected = (
        load_model(find_checkpoints(runs.folder / run)[-1]).state_dict() for run in (name, alone)
    )
    for key, weight in expected.items():
        assert torch.allclose(weights[key], weight, atol=1e-4), key


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bf16_is_close_and_a_nan_loss_on_one_worker_is_skipped_by_both(
    runs: Runs, parallel: str
) -> None:
    found, name = runs.numbers(f"{parallel}-bf16"), f"{parallel}-bad"
    assert found == pytest.approx(runs.numbers("alone-bf16"), abs=0.03)
    assert found == pytest.approx(runs.numbers("alone"), abs=0.1)
    weights = load_model(find_checkpoints(runs.folder / f"{parallel}-bf16")[-1]).state_dict()
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}
    assert runs.numbers(name)[:3] == pytest.approx(runs.numbers("alone")[:3], abs=1e-5)
    assert len(runs.numbers(name)) == RECIPE["num_steps"] - 1
    assert [event["step"] for event in runs.events(name, "skipped")] == [BAD_STEP + 1]


def test_a_sharded_run_saves_what_an_unsharded_one_saves(runs: Runs) -> None:
    alone, sharded = (
        load_training_state(find_checkpoints(runs.folder / name)[0])["optimizer"]
        for name in ("alone", "fsdp")
    )
    assert sharded["state"].keys() == alone["state"].keys()
    for number, moment in alone["state"].items():
        for name, value in moment.items():
            other = sharded["state"][number][name]
            assert type(other) is torch.Tensor
            assert torch.allclose(value, other, atol=1e-6), (number, name)
    assert sharded["param_groups"] == alone["param_groups"]
