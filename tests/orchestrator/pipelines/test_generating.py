"""Texts from a checkpoint: streamed as they come, batched without a change, stopped where asked."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from iiet.decoder import Decoder
from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.data.store import open_tokens
from orchestrator.evaluation.answers import Sampling
from orchestrator.models.open import open_model
from orchestrator.pipelines import generating
from orchestrator.pipelines.generating import TextGenerator
from orchestrator.training.checkpoint import save_checkpoint
from orchestrator.workspace.errors import UserError

FEW = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def writer(tmp_path_factory, tiny_tokens) -> TextGenerator:
    config = ModelConfig(
        vocab_size=300,
        dim=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        ffn_dim=32,
        context_length=32,
        schedule=IterationSchedule((2, 1)),
        initializer_std=0.4,
    )
    torch.manual_seed(1)
    checkpoint = save_checkpoint(
        tmp_path_factory.mktemp("run"),
        1,
        config=config,
        weights=Decoder(config).state_dict(),
        training_state={},
        tokenizer_path=open_tokens(tiny_tokens).tokenizer_path,
        provenance={},
    )
    return TextGenerator(open_model(checkpoint))


def test_the_pieces_are_the_decoded_tokens(writer):
    ids = [writer.tokenizer.prefix_id, *writer.tokenizer.tokenizer.encode("abc def").ids]
    tokens = writer.decoder.generate(
        torch.tensor([ids]),
        max_new_tokens=8,
        eos_token_id=[writer.tokenizer.prefix_id],
    )[0, len(ids) :]
    text = "".join(writer.stream("abc def", FEW))
    assert text
    assert text == writer.tokenizer.tokenizer.decode(tokens.tolist()).rstrip("\ufffd")


def test_a_batch_of_different_lengths_says_what_each_says_alone(writer):
    prompts = ["a", "abc def ghi", "lmno pa"]
    alone = ["".join(writer.stream(prompt, FEW)) for prompt in prompts]
    assert writer.continue_all(prompts, FEW) == alone


def test_a_seed_decides_and_no_seed_does_not(writer):
    sampled = replace(FEW, temperature=1.5, top_k=50, seed=3)
    text = "".join(writer.stream("abc", sampled))
    assert "".join(writer.stream("abc", sampled)) == text
    texts_of_other_seeds = {
        "".join(writer.stream("abc", replace(sampled, seed=seed))) for seed in range(4, 9)
    }
    assert texts_of_other_seeds != {text}
    # In a batch, each prompt has a seed of its own.
    assert writer.continue_all(["abc", "a"], sampled)[0] == text
    assert len(set(writer.continue_all(["abc"] * 4, sampled))) > 1


@pytest.mark.parametrize("draft", ["0", "2,0", "3,1", "auto"])
def test_drafts_change_no_text(writer, draft):
    """Drafts change neither one prompt's text nor a batch's: greedy, sampled, with a stop text."""
    notes: list[str] = []
    drafting = TextGenerator(
        open_model(writer.checkpoint), draft, draft_tokens=3, note=notes.append
    )
    assert drafting.record is not None
    stop = ("".join(writer.stream("abc def", FEW))[2:4],)
    for sampling in (FEW, replace(FEW, temperature=1.0, seed=5), replace(FEW, stop=stop)):
        text = "".join(writer.stream("abc def", sampling))
        assert "".join(drafting.stream("abc def", sampling)) == text
        prompts = ["a", "abc def ghi", "lmno pa"]
        assert drafting.continue_all(prompts, sampling) == writer.continue_all(prompts, sampling)
    assert drafting.record.drafted > 0
    assert len(notes) == 6
    assert re.search(r"^\d+\.\d% of \d+ drafted .*, \d\.\d\d tokens per ver", notes[0])


def test_elastic_weights_draft_under_the_schedules_that_they_learned(save_tiny, tmp_path):
    folder = save_tiny(tmp_path, context_length=32, provenance={"elastic": ["1,1", "1,0"]})
    drafting = TextGenerator(open_model(folder), "auto", draft_tokens=2)
    assert "".join(drafting.stream("abc", FEW)) is not None
    assert drafting.record is not None
    assert drafting.record.rounds_by_draft
    assert set(drafting.record.rounds_by_draft) <= {"1,1", "1,0"}


def test_a_stop_text_may_span_tokens(writer):
    sampled = replace(FEW, temperature=1.0, seed=5)
    full_text = "".join(writer.stream("abc def", sampled))
    for size in (2, 3, 4):
        stop = full_text[len(full_text) // 2 :][:size]
        assert len(writer.tokenizer.encode(stop, add_special_tokens=False)) > 1
        sampling = replace(sampled, stop=("not there", "", stop))
        pieces = list(writer.stream("abc def", sampling))
        assert "".join(pieces) == full_text[: full_text.index(stop)]
        assert writer.continue_all(["abc def"], sampling) == ["".join(pieces)]


def test_what_may_begin_a_stop_text_is_held_back_and_characters_come_whole(writer):
    ids = writer.tokenizer.tokenizer.encode("a b c").ids
    text = [writer.tokenizer.decode([token]) for token in ids]
    assert list(writer.pieces(ids, [f"{text[-1]}d"])) == [*text[:-1], text[-1]]
    held = list(writer.pieces(ids, [f"{text[-2]}{text[-1]}d"]))
    assert held == [*text[:-2], text[-2] + text[-1]]
    pieces = list(writer.pieces(writer.tokenizer.tokenizer.encode("é 好 你").ids, ()))
    assert "".join(pieces) == "é 好 你"
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("prompt", ["abc", "a long prompt, it is, and no end of it"])
def test_without_a_number_the_continuation_fills_the_context(writer, prompt):
    place = writer.decoder.config.context_length - len(writer.tokenizer.encode_document(prompt))
    assert 0 < place < 64
    filling = Sampling(max_new_tokens=place)
    text = "".join(writer.stream(prompt, filling))
    assert "".join(writer.stream(prompt, Sampling())) == text
    assert writer.continue_all([prompt, "a"], Sampling()) == writer.continue_all(
        [prompt, "a"], filling
    )
    assert Sampling().options(500)["max_new_tokens"] == 64


def test_what_cannot_be_done_is_said_before_anything_is_written(writer):
    long = "xq " * writer.decoder.config.context_length
    model = open_model(writer.checkpoint)
    last = TextGenerator(model, "0")
    for do, words in (
        (lambda: writer.continue_all([], FEW), "nothing to continue"),
        (lambda: writer.stream(long, Sampling()), "do not fit the context_length of 32"),
        (lambda: writer.continue_all([long, "abc"], Sampling()), "fit the context_length of 32"),
        (lambda: writer.stream("abc", replace(FEW, max_new_tokens=500)), "at most 29 new ones"),
        (lambda: writer.stream("abc", replace(FEW, temperature=1.0, top_p=1.5)), "top_p"),
        (
            lambda: last.stream("abc", replace(FEW, kv_strategy="last")),
            "kv_strategy must be 'exact' with a draft",
        ),
        (
            lambda: TextGenerator(model, "1,2,3"),
            "^--draft: the iteration schedule 1,2,3 is for 3 layers",
        ),
    ):
        with pytest.raises(UserError, match=words):
            do()


@pytest.mark.slow
def test_the_function_takes_a_schedule(writer, tmp_path):
    options: dict[str, Any] = {"workspace": tmp_path, "model": writer.checkpoint}
    options["max_new_tokens"] = FEW.max_new_tokens
    without = TextGenerator(open_model(writer.checkpoint, schedule="0"))
    pruned = without.continue_all(["abc", "a"], FEW)
    assert generating.generate(["abc", "a"], schedule="0", **options) == pruned
    assert generating.generate("abc", schedule="0", **options) == pruned[0]
    assert "".join(generating.generate_stream("abc", schedule="0", **options)) == pruned[0]
