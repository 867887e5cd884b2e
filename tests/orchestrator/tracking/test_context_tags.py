"""A run says who started it, with which command, and which commit of the code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.tracking.store import context_tags

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from mlflow.tracking.context import registry

    for provider in registry._run_context_provider_registry:
        if hasattr(provider, "_cache"):
            monkeypatch.setattr(provider, "_cache", {})
    context_tags.cache_clear()
    yield
    context_tags.cache_clear()


def git(*arguments: str, folder: Path) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", *settings, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_command_is_named_without_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/env/bin/iiet-orch", "pretrain", "--set", "a=secret"])
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "sesame")
    tags = context_tags()
    assert tags["mlflow.source.name"] == "iiet-orch pretrain"
    assert tags["mlflow.user"] == "ann"
    assert not any("secret" in value or "sesame" in value for value in tags.values())


def test_a_script_in_a_repository_has_its_commit_and_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "study.py"
    script.write_text("pass\n", encoding="utf-8")
    git("init", "-q", folder=tmp_path)
    git("remote", "add", "origin", "https://ann:sesame@example.org/study.git", folder=tmp_path)
    git("add", "study.py", folder=tmp_path)
    git("commit", "-q", "-m", "a", folder=tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    tags = context_tags()
    assert tags["mlflow.source.name"] == str(script)
    assert tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD", folder=tmp_path)
    assert tags["mlflow.source.git.repoURL"] == "https://example.org/study.git"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this copy of the code has no history")
def test_a_program_elsewhere_has_the_commit_of_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "iiet-orch"), "sweep"])
    assert context_tags()["mlflow.source.git.commit"] == git("rev-parse", "HEAD", folder=ROOT)
