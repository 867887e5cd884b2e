"""One process at a time runs a sweep."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from small_size import SMALL

from orchestrator.pipelines import sweeps
from orchestrator.pipelines.context import Context
from orchestrator.settings import read_settings
from orchestrator.workspace.errors import Interrupted, UserError
from orchestrator.workspace.layout import open_workspace


def test_the_same_sweep_is_refused_while_it_runs_and_not_once_it_has_ended(tmp_path, monkeypatch):
    plan = sweeps.plan_sweep(read_settings("toy", SMALL, {}), workspace=tmp_path)
    context = Context(workspace=open_workspace(tmp_path))
    refusals: list[str] = []

    @contextmanager
    def call_again(*_: object) -> Iterator[None]:
        with pytest.raises(UserError) as caught:
            sweeps.run_sweep(plan, context)
        refusals.append(str(caught.value))
        raise Interrupted("the first call has ended")
        yield

    monkeypatch.setattr(sweeps, "joined_cluster", call_again)
    for _ in range(2):
        with pytest.raises(Interrupted):
            sweeps.run_sweep(plan, context)
    assert len(refusals) == 2
    for refusal in refusals:
        assert f"process {os.getpid()} on {socket.gethostname()}" in refusal
