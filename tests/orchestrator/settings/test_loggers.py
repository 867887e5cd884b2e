"""The loggers are MLflow, and TensorBoard where it is installed."""

from __future__ import annotations

import pytest

from orchestrator.cli import main
from orchestrator.settings import cluster as tracking_settings
from orchestrator.settings import resolve_settings
from orchestrator.workspace.errors import UserError


def test_mlflow_logs_alone_or_with_tensorboard() -> None:
    assert resolve_settings({}).tracking.loggers == ("mlflow",)
    both = resolve_settings({}, ["tracking.loggers=[mlflow, tensorboard]"])
    assert both.tracking.loggers == ("mlflow", "tensorboard")
    with pytest.raises(UserError, match="mlflow always logs"):
        resolve_settings({}, ["tracking.loggers=[tensorboard]"])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("mlflow,tensorboard", "`pip install 'iiet-orch[tensorboard]'` installs it"),
        ("mlflow,wandb", "'mlflow' or 'tensorboard'"),
    ],
)
def test_a_logger_that_is_not_there_is_one_sentence(
    names: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking_settings, "find_spec", lambda name: None)
    for command in (["pretrain"], ["distill", "-r", "1"], ["sweep", "toy"], ["quickstart"]):
        assert main([*command, "--logger", names]) == 2
        error = capsys.readouterr().err
        assert words in " ".join(error.split())
        assert "Traceback" not in error
