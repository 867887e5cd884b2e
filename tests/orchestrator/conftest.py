"""A made-up sweep that looks like a measured one: 6 layers, r = 3, influence as a contraction."""

from __future__ import annotations

import numpy as np
import pytest
from sample_trials import sample_trial

from iiet.iiad.pruning import schedule_family
from iiet.model.schedule import IterationSchedule
from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.records.trial import Trial

Influence = tuple[tuple[float, ...], ...]


@pytest.fixture
def sample_influence() -> Influence:
    return (
        (0.0051, 0.0037, 0.0031),
        (0.0233, 0.0045, 0.0013),
        (0.0193, 0.0028, 0.0007),
        (0.0167, 0.0022, 0.0003),
        (0.0139, 0.0022, 0.0004),
        (0.0266, 0.0027, 0.0003),
    )


def made_up(
    key: str, role: str, schedule: IterationSchedule | None, accuracy: float, **more: object
) -> Trial:
    evaluations = schedule.num_evaluations if schedule else 6
    values: dict[str, object] = {
        "key": key,
        "role": role,
        "method": "iiet" if schedule else "vanilla",
        "schedule": schedule.corrections if schedule else None,
        "cost": {
            "evaluations": evaluations,
            "relative_evaluations": evaluations / 24,
            "flops_per_token": 0.35e6 * evaluations + 0.5e6,
            "relative_flops": (0.35 * evaluations + 0.5) / (0.35 * 24 + 0.5),
            "kv_bytes_per_token": 1024.0 * evaluations,
            "decode_ms_per_token": 0.31 * evaluations + 0.55,
            "decode_ms_spread": 0.05,
        },
        "quality": {
            "accuracy": accuracy,
            "accuracy_stderr": 0.0121,
            "bits_per_byte": 2.9 - accuracy,
            "validation_loss": 5.6 - 2 * accuracy,
            "perplexity": 120.0 - 50 * accuracy,
            "lastword/acc": accuracy - 0.12,
            "lastword/acc_stderr": 0.0165,
            "continuation/acc": accuracy + 0.12,
            "continuation/acc_stderr": 0.0172,
        },
        "train": {"steps": 150.0, "tokens": 307200.0, "seconds": 21.0, "flops": 1.2e12},
        "checkpoint": f"/workspace/trials/{key}/step_00000150",
        "parent": "7e1c0ffee0000000" if role == "trial" else None,
    }
    return sample_trial(**{**values, **more})


@pytest.fixture
def sample_results(sample_influence) -> list[Trial]:
    """Nine trials from all corrections to none, the teacher, vanilla and r = 0."""
    family = schedule_family(sample_influence)
    chosen = [0, 3, 6, 8, 10, 11, 12, 14, 16]
    accuracies = [0.4462, 0.4447, 0.4470, 0.4441, 0.4452, 0.4437, 0.4391, 0.4260, 0.4128]
    trials = [
        made_up(
            f"trial{index:02d}00000000"[:16],
            "trial",
            family[index].schedule,
            accuracy,
            label=str(family[index].schedule),
            threshold_above=family[index].threshold_above,
            threshold_up_to=family[index].threshold_up_to,
        )
        for index, accuracy in zip(chosen, accuracies, strict=True)
    ]
    none = IterationSchedule.none(6)
    return [
        made_up("7e1c0ffee0000000", "teacher", family[0].schedule, 0.4465, label="teacher"),
        *trials,
        made_up("vanilla000000000", "baseline", None, 0.4176, label="vanilla"),
        made_up("rzero00000000000", "baseline", none, 0.4205, label="r = 0 from scratch"),
    ]


@pytest.fixture
def sample_evaluations(sample_results) -> dict[str, EvaluationResult]:
    """What the models answered: 1,000 items of each of two tasks, that all find alike hard."""
    hardness = np.random.default_rng(0).permutation(1000) / 1000
    found = {}
    for result in sample_results:
        tasks = {}
        for name in ("lastword", "continuation"):
            right = (hardness < result.numbers[f"quality/{name}/acc"]).astype(float)
            tasks[name] = TaskResult(
                name=name,
                version="1",
                num_items=1000,
                num_fewshot=0,
                metrics={"acc": float(right.mean())},
                items=[f"{name}-{number}" for number in range(1000)],
                values={"acc": right.tolist()},
            )
        found[result.key] = EvaluationResult(results=tasks)
    return found
