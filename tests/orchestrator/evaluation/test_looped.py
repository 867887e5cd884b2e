"""What a class says of a looped model's cost is what runs, at three depths; a mismatch is named."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from looped_models import MODELS, write_looped
from transformers import AutoConfig, Inkling2LoopForConditionalGeneration

from orchestrator.evaluation.looped import check_loops, load_transformers
from orchestrator.models.folder import TOKENIZER
from orchestrator.models.loops import Ouro
from orchestrator.models.open import OpenedModel, open_model
from orchestrator.workspace.errors import UserError

COSTS: dict[str, dict[str, tuple[int, int]]] = {
    # A slot of a token has 2 x 32 numbers: 4 heads of 8.
    "ouro": {"1": (3, 3 * 64), "2": (6, 6 * 64), "4": (12, 12 * 64)},
    "huginn_raven": {"1": (4, 4 * 64), "2": (6, 6 * 64), "5": (12, 12 * 64)},
    "hrm_text": {"2,3": (16, 16 * 64), "1,3": (8, 8 * 64), "2,1": (8, 8 * 64), "1": (8, 8 * 64)},
    # 2 heads of 16 where it attends to a window, 2 of 8 in the sixth layer, which is not looped.
    "inkling2_loop_text": {
        depth: (6 + 2 * (passes - 1), (5 + 2 * (passes - 1)) * 64 + 32)
        for depth, passes in {"1": 1, "2": 2, "4": 4}.items()
    },
}
"""Kind -> depth -> layer runs, and numbers in the cache, of a token."""


@pytest.mark.parametrize("kind", MODELS)
def test_costs_are_those_of_what_runs(kind: str, tmp_path: Path, tiny_tokens: Path) -> None:
    folder, outputs = write_looped(tmp_path / "model", kind, tiny_tokens / TOKENIZER), []
    for depth, costs in COSTS[kind].items():
        model = open_model(folder, depth)
        assert model.loops is not None
        assert model.depth is not None
        assert (model.loops.layer_runs(model.depth), model.loops.kv_numbers(model.depth)) == costs
        # Loading compares the class with what runs.
        loaded = load_transformers(folder, model.loops, model.depth, trust_remote_code=True)
        with torch.no_grad():
            outputs.append(loaded(torch.arange(12)[None]).logits)
    assert all(not torch.equal(outputs[0], other) for other in outputs[1:3]), "depths differ"


def test_the_text_part_of_a_model_that_sees_pictures_is_loaded(
    tmp_path: Path, tiny_tokens: Path
) -> None:
    folder = write_looped(tmp_path / "model", "inkling2_loop_text", tiny_tokens / TOKENIZER)
    text = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"model_type": "inkling2_vision", "text_hidden_size": 32, **sizes}
    config = AutoConfig.for_model("inkling2_loop", text_config=text, vision_config=vision)
    Inkling2LoopForConditionalGeneration(config).save_pretrained(folder)
    model = open_model(folder, "3")
    assert (model.architecture, model.depth, model.context_length) == ("inkling2_loop", (3,), 64)
    loaded = load_transformers(folder, model.loops, model.depth)
    assert loaded.config.loop_num_passes == 3


class Wrong(Ouro):
    """Says that a part of each slot is not kept."""

    def kv_numbers(self, depth: tuple[int, ...]) -> int:
        return super().kv_numbers(depth) // 2


def test_a_model_that_does_not_run_as_its_class_says_is_refused(
    tmp_path: Path, tiny_tokens: Path
) -> None:
    folder = write_looped(tmp_path / "model", "ouro", tiny_tokens / TOKENIZER)
    model: OpenedModel = open_model(folder)
    assert (model.depth, model.key) == ((4,), open_model(folder, "4").key)
    assert model.key != open_model(folder, "3").key
    loops = model.loops
    assert loops is not None
    loaded = load_transformers(folder, loops, (2,), trust_remote_code=True)
    with pytest.raises(UserError, match="6 layer runs of a token instead of 9, 2 loops"):
        check_loops(loaded, loops, (3,))
    with pytest.raises(UserError, match=r"384 numbers that .* cache instead of 192"):
        check_loops(loaded, Wrong(loops.config), (2,))
    # Layers that were saved once for each loop: a stack of six that runs once.
    layers = loaded.model.layers
    layers.extend(deepcopy(layer) for layer in list(layers))
    loaded.steps = 1
    with pytest.raises(UserError, match=r"^at depth 2 .* says: 6 layers with .* of 3, 1 lo"):
        check_loops(loaded, loops, (2,))


def test_a_random_start_is_the_same_each_time(tmp_path: Path, tiny_tokens: Path) -> None:
    folder = write_looped(
        tmp_path / "model", "huginn_raven", tiny_tokens / TOKENIZER, state_init="normal"
    )
    model, tokens = open_model(folder), torch.arange(12)[None]
    loaded = load_transformers(folder, model.loops, model.depth, trust_remote_code=True)
    torch.manual_seed(1)
    first, drawn = loaded(tokens).logits, torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn), "the numbers of the program are not touched"
    assert torch.equal(loaded(tokens).logits, first)
