"""All metrics of influence against the accuracy lost, on a small model of a depth task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_tracking import untracked

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.schedule import IterationSchedule
from orchestrator.data.depth.store import write_depth
from orchestrator.data.sources import open_data
from orchestrator.pipelines import influence, influence_check
from orchestrator.pipelines.influence_check import compare_metrics
from orchestrator.settings import DataSettings, InfluenceSettings
from orchestrator.settings.depth import DepthSettings
from orchestrator.training.checkpoint import check_checkpoint, save_checkpoint
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.folders import Workspace

SETTINGS = InfluenceSettings(num_tokens=256)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    depth = DepthSettings(tasks=("phop_2",), num_symbols=2, length=8)
    return write_depth(DataSettings(source="depth", depth=depth), tmp_path)


def make_checkpoint(folder: Path, tokens: Path, decoder: Decoder) -> Path:
    return save_checkpoint(
        folder,
        1,
        config=decoder.config,
        weights=decoder.state_dict(),
        training_state={},
        tokenizer_path=open_data(tokens).tokenizer_path,
        provenance={"tokens": tokens.name},
    )


def make_decoder(tiny_model: dict[str, Any], **changes: Any) -> Decoder:
    torch.manual_seed(0)
    config = {**tiny_model, "context_length": 8, "initializer_std": 0.5, **changes}
    return Decoder(ModelConfig.from_dict(config))


@pytest.mark.slow  # It draws four pictures.
@torch.no_grad()
def test_costs_are_accuracies_lost_by_stopping_early_and_are_found_again(
    tmp_path: Path, tokens: Path, tiny_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(tiny_model)
    checkpoint = make_checkpoint(tmp_path / "run", tokens, decoder)
    context = untracked(Workspace(tmp_path))
    result = compare_metrics(checkpoint, SETTINGS, tokens, context)

    (batch,) = open_data(tokens).validation_batches(context_length=8, num_tokens=256, batch_size=32)

    def accuracy(*corrections: int) -> float:
        best = decoder(batch.input_ids, schedule=IterationSchedule(corrections)).argmax(-1)
        return 100 * (best == batch.targets)[batch.counted].double().mean().item()

    lost = [accuracy(2, 1) - accuracy(*stopped) for stopped in ((0, 1), (1, 1), (2, 0))]
    assert result.check.names == [(1, 1), (1, 2), (2, 1)]
    assert result.check.costs == pytest.approx(lost)
    assert len(set(lost)) > 1
    assert IterationSchedule((0, 0)) in result.check.pruned
    for schedule, share in result.check.pruned.items():
        assert 100 * share == pytest.approx(accuracy(*schedule))
    assert result.to_pandas()["cost"].tolist() == result.check.costs
    stored = json.loads((checkpoint / "influence_check.json").read_text())
    assert stored["costs"] == result.check.costs
    assert result.picture is not None
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    check_checkpoint(checkpoint)  # The checkpoint is still whole.

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(influence, "influence_table", fail)
    monkeypatch.setattr(influence_check, "validation_metrics", fail)
    assert compare_metrics(checkpoint, SETTINGS, tokens, context).check == result.check


def test_a_model_without_corrections_is_refused(
    tmp_path: Path, tokens: Path, tiny_model: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "run", tokens, make_decoder(tiny_model, schedule=0))
    with pytest.raises(UserError, match="without corrections"):
        compare_metrics(checkpoint, SETTINGS, tokens, untracked(Workspace(tmp_path)))
