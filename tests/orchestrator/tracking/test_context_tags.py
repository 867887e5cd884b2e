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
def fresh(monkeypatch) -> Iterator[None]:
    from mlflow.tracking.context import registry

    for provider in registry._run_context_provider_registry:
        if hasattr(provider, "_cache"):
            monkeypatch.setattr(provider, "_cache", {})
    context_tags.cache_clear()
    yield
    context_tags.cache_clear()


def test_the_command_is_named_without_its_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/env/bin/iiet-orch", "pretrain", "--set", "a=secret"])
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "sesame")
    tags = context_tags()
    assert tags["mlflow.source.name"] == "iiet-orch pretrain"
    assert tags["mlflow.user"] == "ann"
    assert not any("secret" in value or "sesame" in value for value in tags.values())
    if (ROOT / ".git").exists():  # A program elsewhere has the commit of this package.
        head = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert tags["mlflow.source.git.commit"] == commit.strip()


def test_a_script_in_a_repository_has_its_commit_and_no_password(tmp_path, monkeypatch):
    (tmp_path / "study.py").write_text("pass\n", encoding="utf-8")
    identity = "git -c user.name=a -c user.email=a@b"
    commands = (
        "git init -q && git remote add origin https://ann:sesame@example.org/study.git && "
        f"git add study.py && {identity} commit -q -m a && git rev-parse HEAD"
    )
    done = subprocess.run(
        commands, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "study.py")])
    tags = context_tags()
    assert tags["mlflow.source.name"] == str(tmp_path / "study.py")
    assert tags["mlflow.source.git.commit"] == done.stdout.strip()
    assert tags["mlflow.source.git.repoURL"] == "https://example.org/study.git"
