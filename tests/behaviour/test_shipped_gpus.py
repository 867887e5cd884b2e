"""Every shipped sweep fits the devices that it names, by its own plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from refusals import refused

from orchestrator import SweepPlan, plan_sweep
from orchestrator.settings import read_settings
from orchestrator.settings.files import shipped_sweeps
from orchestrator.workspace.errors import UserError

NUM_STUDENTS = 3 * 8
"""Students of three teachers, under eight budgets each."""
ON_GPUS = {"paper-340m": 8, "paper-55m": 8}
"""Shipped sweeps whose settings name GPUs -> how many."""
PER_PASS = "num_sequences_per_pass"
ONE_TEACHER = ("sweep.teachers=[]", "sweep.budgets=[]")
"""Settings of a sweep over the schedules of one teacher of any depth."""


@pytest.fixture(autouse=True)
def _no_gpu_here(monkeypatch) -> None:
    # Machines with a GPU of their own would plan for that one.
    monkeypatch.setitem(sys.modules, "pynvml", None)


def planned(name: str, workspace: Path, *assignments: str) -> SweepPlan:
    """Plan a shipped sweep."""
    settings = read_settings(shipped_sweeps()[name], assignments)
    return plan_sweep(settings, workspace=workspace)


def test_the_sweeps_for_gpus_are_these():
    num_gpus_of_sweeps = {
        name: read_settings(path).cluster.num_gpus for name, path in shipped_sweeps().items()
    }
    assert {name: number for name, number in num_gpus_of_sweeps.items() if number} == ON_GPUS
    # A thousandth of their tokens is more than any measurement reads.
    assert {read_settings(name).data.validation_fraction for name in ON_GPUS} == {0.001}


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_sweep_for_gpus_just_fits_the_assumed_one_and_is_refused_on_cpus(name, tmp_path):
    plan = planned(name, tmp_path)
    assert plan.price.num_trainings == 5 + NUM_STUDENTS, "teachers, vanilla, r = 0, students"
    assert plan.problems["an H100"] is None
    assert f"each trial runs on 1 GPU, at most {ON_GPUS[name]} at once" in plan.notes
    assert plan.price.num_devices == ON_GPUS[name]
    assert plan.price.rate.source == "H100, bf16, dense"
    # None of the passes is smaller than it has to be, and the plan of each part is looked at.
    per_pass = 2 * int(read_settings(shipped_sweeps()[name]).training.num_sequences_per_pass or 0)
    alone = f"training.{PER_PASS}={per_pass}", "cluster.num_gpus=1"
    problem = planned(name, tmp_path, *alone).problems["an H100"]
    assert f"set training.{PER_PASS} lower" in str(problem)
    students = f"distillation.training.{PER_PASS}={per_pass}"
    problem = planned(name, tmp_path, students, "sweep.gpus_per_trial=1").problems["an H100"]
    assert f"set distillation.training.{PER_PASS} lower" in str(problem)
    with refused(UserError, "sweep.gpus_per_trial=0"):
        planned(name, tmp_path, "sweep.gpus_per_trial=0")


def test_the_time_of_a_sweep_is_that_of_its_trials_on_eight_gpus(tmp_path):
    prices = {
        number: planned("paper-340m", tmp_path, *ONE_TEACHER, f"sweep.num_schedules={number}").price
        for number in (2, 8, 9, 16, 17)
    }
    hours = {number: price.hours[0] for number, price in prices.items()}
    assert prices[2].rate
    flops_of_trial = prices[9].flops - prices[8].flops
    flops_per_second = prices[2].rate.peak_flops * prices[2].rate.shares[1]
    hours_of_trial = flops_of_trial / flops_per_second / 3600
    with_a_ninth = pytest.approx(hours[2] + hours_of_trial)
    assert hours[8] == hours[2], "side by side"
    assert hours[9] == hours[16] == with_a_ninth, "the ninth waits for a GPU"
    assert hours[17] == pytest.approx(hours[2] + 2 * hours_of_trial)


def test_trials_share_a_model_that_is_too_large_for_one_gpu(tmp_path):
    sizes = ("dim=4096", "num_layers=32", "num_heads=32", "num_kv_heads=32", "ffn_dim=11008")
    large = [*ONE_TEACHER, *(f"model.{size}" for size in ("preset=1.3b", *sizes))]
    for section in ("training", "distillation.training"):
        large += [f"{section}.{PER_PASS}=1", f"{section}.activation_checkpointing=true"]
    problem = planned("paper-340m", tmp_path, *large).problems["an H100"]
    assert "cluster.parallel=fsdp" in str(problem)
    plan = planned("paper-340m", tmp_path, *large, "cluster.parallel=fsdp")
    assert plan.problems["an H100"] is None
    assert plan.states, plan.notes


def test_other_sweeps_run_on_cpus(tmp_path):
    plan = planned("methods", tmp_path)
    assert not plan.price.uses_gpus
    assert set(plan.problems) == {"this machine"}
