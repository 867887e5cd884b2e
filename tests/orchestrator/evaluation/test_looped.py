"""What a class says of a looped model's cost is what runs, at three depths; a mismatch is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from looped_models import MODELS, write_looped
from refusals import refused
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.evaluation.looped import LoopedDecoder, check_loops, load_transformers
from orchestrator.models.folder import TOKENIZER
from orchestrator.models.loops import Ouro
from orchestrator.models.open import OpenedModel, open_model
from orchestrator.workspace.errors import UserError

COSTS: dict[str, dict[str, tuple[int, int]]] = {
    # A slot of a token has 2 x 32 numbers: 4 heads of 8.
    "ouro": {"1": (3, 3 * 64), "2": (6, 6 * 64), "4": (12, 12 * 64)},
    "nanbeige": {"1": (3, 3 * 64), "2": (6, 6 * 64), "4": (12, 12 * 64)},
    "huginn_raven": {"1": (4, 4 * 64), "2": (6, 6 * 64), "5": (12, 12 * 64)},
    "hrm_text": {"2,3": (16, 16 * 64), "1,3": (8, 8 * 64), "2,1": (8, 8 * 64), "1": (8, 8 * 64)},
    # 2 heads of 16 where it attends to a window, 2 of 8 in the sixth layer, which is not looped.
    "inkling2_loop_text": {
        depth: (6 + 2 * (passes - 1), (5 + 2 * (passes - 1)) * 64 + 32)
        for depth, passes in {"1": 1, "2": 2, "3": 3}.items()
    },
}
"""Kind -> depth -> layer runs, and numbers in the cache, of a token."""
Flops = Callable[[int, int, int], int]
FLOPS: dict[str, Flops] = {
    # Five square matrices and attention in each run, an adapter from 64 to 32, a head for 300.
    "ouro": lambda runs, num_seen, _: runs * (2 * 5 * 32**2 + 4 * 32 * num_seen) + 2 * 32 * 300,
    "huginn_raven": lambda runs, num_seen, loops: (
        FLOPS["ouro"](runs, num_seen, loops) + loops * 2 * 64 * 32
    ),
}
FLOPS["nanbeige"] = FLOPS["ouro"]
"""Kind -> FLOPs of a decoded token, by its layer runs, the tokens that it sees, and its loops."""


SLOW_KINDS = ("hrm_text", "inkling2_loop_text")
"""Kinds of many layers."""


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) if k in SLOW_KINDS else k for k in MODELS],
)
def test_costs_are_those_of_what_runs(kind, tmp_path, tiny_tokens):
    folder = write_looped(tmp_path / "model", kind, tiny_tokens / TOKENIZER)
    outputs = []
    read_tokens = []
    counted = []
    tokens = torch.arange(12)[None]
    for depth, costs in COSTS[kind].items():
        model = open_model(folder, schedule=depth)
        assert model.loops is not None
        assert model.depth is not None
        # Loading compares the class with what runs.
        decoder = LoopedDecoder(model, trust_remote_code=True)
        cost = decoder.cost()
        assert (cost.evaluations_per_token, cost.kv_bytes_per_token) == (costs[0], 4 * costs[1])
        counted.append((costs[0], cost.decode_flops_per_token))
        if kind in FLOPS:
            for num_seen in (1, 10, 64):
                expected = FLOPS[kind](costs[0], num_seen, model.depth[0])
                assert decoder.cost(context_length=num_seen).decode_flops_per_token == expected
        with torch.no_grad():
            read_tokens.append(tokens)
            outputs.append(decoder.model(tokens).logits)
            for next_token in decoder.stream(tokens, 3):  # Its cache changes nothing.
                assert next_token == decoder.model(tokens).logits[0, -1].argmax()
                tokens = torch.cat([tokens, next_token[None]], -1)
    assert all(not torch.equal(outputs[0], output) for output in outputs[1:3]), "depths differ"
    # As transformers runs it when its own configuration has the depth.
    model = open_model(folder, schedule=[*COSTS[kind]][1])
    config = json.loads((folder / "config.json").read_text()) | model.loops.changes(model.depth)
    (folder / "config.json").write_text(json.dumps(config))
    stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(outputs[1], stock(read_tokens[1]).logits, rtol=0, atol=1e-6)
    per_run = {(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(counted) if a[0] != b[0]}
    assert len(per_run) == 1, "each further layer run takes the same"


@pytest.mark.slow
def test_experts_are_counted_that_a_token_asks(tmp_path, tiny_tokens):
    kind = "inkling2_loop_text"
    tokenizer = tiny_tokens / TOKENIZER
    flops = []
    for number in (1, 2):
        sizes = {"num_experts_per_tok": number, "num_hidden_layers": 4}
        folder = write_looped(tmp_path / f"{number}", kind, tokenizer, **sizes)
        decoder = LoopedDecoder(open_model(folder, schedule="1"))
        layers = sum(name.endswith(".experts") for name, _ in decoder.model.named_modules())
        flops.append(decoder.cost().decode_flops_per_token)
    assert flops[1] - flops[0] == layers * 2 * 3 * 32 * 16


@pytest.mark.slow  # It imports what transformers has for pictures.
def test_the_text_part_of_a_model_that_sees_pictures_is_loaded(tmp_path, tiny_tokens):
    from transformers import Inkling2LoopForConditionalGeneration

    folder = write_looped(tmp_path / "model", "inkling2_loop_text", tiny_tokens / TOKENIZER)
    text = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"model_type": "inkling2_vision", "text_hidden_size": 32, **sizes}
    config = AutoConfig.for_model("inkling2_loop", text_config=text, vision_config=vision)
    Inkling2LoopForConditionalGeneration(config).save_pretrained(folder)
    model = open_model(folder, schedule="3")
    assert (model.architecture, model.depth, model.context_length) == ("inkling2_loop", (3,), 64)
    assert load_transformers(model).config.loop_num_passes == 3


class Wrong(Ouro):
    """Says that a part of each slot is not kept."""

    def kv_numbers(self, depth: tuple[int, ...]) -> int:
        return super().kv_numbers(depth) // 2


def test_a_model_that_does_not_run_as_its_class_says_is_refused(tmp_path, tiny_tokens):
    folder = write_looped(tmp_path / "model", "ouro", tiny_tokens / TOKENIZER)
    model: OpenedModel = open_model(folder)
    assert (model.depth, model.key) == ((4,), open_model(folder, schedule="4").key)
    assert model.key != open_model(folder, schedule="3").key
    loops = model.loops
    assert loops is not None
    loaded = load_transformers(replace(model, depth=(2,)), trust_remote_code=True)
    with refused(UserError, "6 layer runs", "9", "2 loops"):
        check_loops(loaded, loops, (3,))
    with refused(UserError, "384 numbers", "192"):
        check_loops(loaded, Wrong(loops.config), (2,))
    # Layers that were saved once for each loop: a stack of six that runs once.
    layers = loaded.model.layers
    layers.extend(deepcopy(layer) for layer in list(layers))
    loaded.steps = 1
    with refused(UserError, "depth 2", "6 layers", "1 loop"):
        check_loops(loaded, loops, (2,))


def test_a_random_start_is_the_same_each_time(tmp_path, tiny_tokens):
    folder = write_looped(
        tmp_path / "model", "huginn_raven", tiny_tokens / TOKENIZER, state_init="normal"
    )
    tokens = torch.arange(12)[None]
    loaded = load_transformers(open_model(folder), trust_remote_code=True)
    torch.manual_seed(1)
    first = loaded(tokens).logits
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn), "the numbers of the program are not touched"
    assert torch.equal(loaded(tokens).logits, first)
