"""A precision that nobody set follows the device that the settings name."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.settings import Settings, read_settings, resolve_settings, to_yaml


def precisions(*assignments: str) -> tuple[str, str, str | None]:
    settings = resolve_settings({}, assignments)
    distillation, evaluation = settings.distillation.training, settings.evaluation
    return settings.training.precision, distillation.precision, evaluation.precision


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ((), ("fp32", "fp32", None)),
        (("cluster.num_gpus=8",), ("bf16", "bf16", "bf16")),
        (("cluster.num_gpus=8", "training.precision=fp32"), ("fp32", "bf16", "bf16")),
        (("cluster.num_gpus=1", "distillation.training.precision=fp32"), ("bf16", "fp32", "bf16")),
        (("cluster.num_gpus=1", "evaluation.precision=fp32"), ("bf16", "bf16", "fp32")),
        # A run on CPUs whose trials have GPUs: only what the trials do is in bf16.
        (("sweep.gpus_per_trial=1",), ("fp32", "bf16", "bf16")),
        (("sweep.gpus_per_trial=1", "sweep.kind=iterations"), ("bf16", "bf16", "bf16")),
    ],
)
def test_the_default_is_that_of_the_devices(
    assignments: tuple[str, ...], expected: tuple[str, str, str | None]
) -> None:
    assert precisions(*assignments) == expected


def test_settings_for_cpus_are_the_defaults_of_the_tree() -> None:
    assert resolve_settings({}) == Settings()


def test_stored_settings_keep_their_precision_on_other_devices(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(resolve_settings({}, ["cluster.num_gpus=8"])))
    assert read_settings(path, ["cluster.num_gpus=0"]).training.precision == "bf16"
    path.write_text("cluster: {num_gpus: 8}\n")
    assert read_settings(path, ["cluster.num_gpus=0"]).training.precision == "fp32"
