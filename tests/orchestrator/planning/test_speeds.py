"""A plan takes the speeds that equal trainings of the workspace had, and says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning.devices import Devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.price import Price, price_of
from orchestrator.planning.speeds import SPREAD, measured_speeds
from orchestrator.records.training import TrainingJob
from orchestrator.reporting.command_tables import price_rows
from orchestrator.training.job import write_job_file
from orchestrator.training.trainer import run_job
from orchestrator.workspace.journal import GFLOPS_METRIC, JOURNAL_NAME, Journal
from orchestrator.workspace.processors import num_cpus, processor_name

HERE = {
    "processor": processor_name(), "device": "cpu", "num_workers": 1, "num_threads": num_cpus(),
}  # fmt: skip
MEASURED = "at speeds that were measured in this workspace"


@pytest.fixture
def run_at(workspace, tiny_job) -> Callable[..., Estimate]:
    """A function that stores a run by the GFLOP/s of its records, and returns what is left."""

    def make(
        name: str, *gflops_per_second: float, devices: dict[str, Any] = HERE, **recipe: Any
    ) -> Estimate:
        job: TrainingJob = tiny_job(name, **recipe)
        job = job.model_copy(update={"run_folder": str(workspace.runs / name)})
        write_job_file(job)
        journal = Journal(job.folder)
        journal.event("started", **devices)
        for step, speed in enumerate(gflops_per_second, start=1):
            journal.metrics(step, {GFLOPS_METRIC: speed})
        journal.close()
        return replace(Estimate.of(job), devices=Devices())

    return make


@pytest.fixture
def price(workspace) -> Callable[..., Price]:
    """A function that returns the price of trainings in the workspace."""

    def make(*trainings: Estimate, mfu: float | None = None) -> Price:
        return price_of(trainings, workspace.root, speeds=measured_speeds(workspace), mfu=mfu)

    return make


def seconds_at(training: Estimate, gflops_per_second: float) -> float:
    return training.total_flops / (1e9 * gflops_per_second)


def test_hours_are_those_of_slow_and_of_fast_equal_trainings(run_at, price):
    # The first record of each process does not count.
    for name, speed in {"busy": 0.001, "slow": 2.0, "usual": 4.0, "fast": 8.0, "lucky": 90}.items():
        run_at(name, 0.001, speed, speed)
    new = run_at("new")
    priced = price(new)
    expected = [seconds_at(new, speed) / 3600 for speed in (8.0 * SPREAD, 2.0 / SPREAD)]
    assert priced.hours == pytest.approx(expected)
    assert (priced.num_assumed, priced.rate) == (0, None)
    words = dict(price_rows(priced, {}))["training time"]
    assert MEASURED in words
    assert "assumed" not in words


def test_the_speed_of_a_training_itself_counts_most(run_at, price):
    run_at("other", 0.001, 2.0)
    own = run_at("own", 0.001, 8.0)
    expected = [seconds_at(own, 8.0 * factor) / 3600 for factor in (SPREAD, 1 / SPREAD)]
    assert price(own).hours == pytest.approx(expected)
    # That of its last process.
    journal = Journal(own.folder)
    journal.event("resumed", **HERE)
    for step, speed in enumerate((0.001, 4.0), start=3):
        journal.metrics(step, {GFLOPS_METRIC: speed})
    journal.close()
    assert price(own).hours == pytest.approx([2 * hours for hours in expected])


@pytest.mark.parametrize(
    ("devices", "recipe"),
    [
        ({"processor": "another one"}, {}),
        ({"num_threads": num_cpus() + 1}, {}),
        ({"num_workers": 2}, {}),
        ({"device": "cuda:0"}, {}),
        ({}, {"num_tokens_per_step": 128}),
        ({}, {"precision": "bf16"}),
    ],
)
def test_other_devices_and_sizes_say_nothing(devices, recipe, run_at, price):
    run_at("other", 0.001, 2.0, devices=HERE | devices, **recipe)
    run_at("short", 2.0)
    new = run_at("new")
    priced = price(new)
    assert priced == price_of([new], Path(), speeds=()).model_copy(
        update={"free_disk": priced.free_disk}
    )
    assert priced.num_assumed == 1


def test_a_plan_says_what_of_it_is_assumed(run_at, price):
    equal = run_at("equal", 0.001, 2.0)
    larger = run_at("larger", num_tokens_per_step=128)
    words = dict(price_rows(price(equal, larger), {}))["training time"]
    assert f"{MEASURED}, but 1 training at 20 to 80% of 0.1 TFLOP/s each" in words
    # A share that a person assumes is taken for all.
    words = dict(price_rows(price(equal, larger, mfu=0.5), {}))["training time"]
    assert MEASURED not in words


def test_a_training_records_what_a_plan_needs(workspace, tiny_job):
    job = tiny_job(num_steps=4, checkpoint_every_steps=2)
    job = job.model_copy(update={"run_folder": str(workspace.runs / "real")})
    run_job(job)
    [speed] = measured_speeds(workspace)
    assert (speed.processor, speed.folder) == (processor_name(), job.folder)
    assert speed.flops_per_second > 0
    # A damaged journal has no speed.
    journal = job.folder / JOURNAL_NAME
    journal.write_text(journal.read_text("utf-8").replace('"num_threads": ', '"num_threads": "x'))
    assert measured_speeds(workspace) == []
