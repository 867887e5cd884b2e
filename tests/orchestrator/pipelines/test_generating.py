"""Texts from a checkpoint: streamed as they come, batched without a change, stopped where asked."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.generation import generate
from iiet.schedule import IterationSchedule
from orchestrator.data.store import open_tokens
from orchestrator.pipelines import generating
from orchestrator.pipelines.generating import Drafting, Sampling, TextGenerator
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import save_checkpoint
from orchestrator.workspace.errors import UserError

FEW = Sampling(max_new_tokens=8)


class Notes(Progress):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory, tiny_tokens: Path) -> TextGenerator:
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
    return TextGenerator(write(Decoder(config), tmp_path_factory.mktemp("run"), tiny_tokens))


def write(decoder: Decoder, folder: Path, tokens: Path, **provenance: Any) -> Path:
    return save_checkpoint(
        folder,
        1,
        config=decoder.config,
        weights=decoder.state_dict(),
        training_state={},
        tokenizer_path=open_tokens(tokens).tokenizer_path,
        provenance=provenance,
    )


def test_neither_mlflow_nor_lm_eval_is_loaded_to_generate() -> None:
    heavy = {"ray", "mlflow", "lm_eval", "transformers", "datasets", "pandas"}
    code = f"import sys, orchestrator.pipelines.generating; print(*{heavy!r} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_pieces_are_the_decoded_tokens(writer: TextGenerator) -> None:
    ids = [writer.text.prefix_id, *writer.text.tokenizer.encode("abc def").ids]
    tokens = generate(
        writer.decoder,
        torch.tensor([ids]),
        max_new_tokens=8,
        stop_tokens=[writer.text.prefix_id],
    )[0, len(ids) :]
    text = "".join(writer.stream("abc def", FEW))
    assert text
    assert text == writer.text.tokenizer.decode(tokens.tolist()).rstrip("\ufffd")


def test_a_batch_of_different_lengths_says_what_each_says_alone(writer: TextGenerator) -> None:
    prompts = ["a", "abc def ghi", "lmno pa"]
    alone = ["".join(writer.stream(prompt, FEW)) for prompt in prompts]
    assert writer.continue_all(prompts, FEW) == alone


def test_a_seed_decides_and_no_seed_does_not(writer: TextGenerator) -> None:
    sampled = replace(FEW, temperature=1.5, top_k=50, seed=3)
    first = "".join(writer.stream("abc", sampled))
    assert "".join(writer.stream("abc", sampled)) == first
    others = {"".join(writer.stream("abc", replace(sampled, seed=seed))) for seed in range(4, 9)}
    assert others != {first}
    # In a batch, each prompt has a seed of its own.
    assert writer.continue_all(["abc", "a"], sampled)[0] == first
    assert len(set(writer.continue_all(["abc"] * 4, sampled))) > 1


@pytest.mark.parametrize("draft", ["0", "2,0", "3,1", "auto"])
def test_drafts_change_no_text(writer: TextGenerator, draft: str) -> None:
    """Neither of one prompt nor of a batch, greedy or sampled, with a stop text."""
    drafting = TextGenerator(writer.checkpoint, drafting=Drafting(draft=draft, num_tokens=3))
    assert drafting.record is not None
    stop = ("".join(writer.stream("abc def", FEW))[2:4],)
    for sampling in (FEW, replace(FEW, temperature=1.0, seed=5), replace(FEW, stop=stop)):
        text = "".join(writer.stream("abc def", sampling))
        assert "".join(drafting.stream("abc def", sampling)) == text
        prompts = ["a", "abc def ghi", "lmno pa"]
        assert drafting.continue_all(prompts, sampling) == writer.continue_all(prompts, sampling)
    assert drafting.record.drafted > 0


def test_elastic_weights_draft_under_the_schedules_that_they_learned(
    writer: TextGenerator, tiny_tokens: Path, tmp_path: Path
) -> None:
    folder = write(writer.decoder, tmp_path, tiny_tokens, elastic=["1,1", "1,0"])
    drafting = TextGenerator(folder, drafting=Drafting(draft="auto", num_tokens=2))
    "".join(drafting.stream("abc", FEW))
    assert drafting.record is not None
    assert set(drafting.record.rounds_by_draft) <= {"1,1", "1,0"}
    assert drafting.record.rounds_by_draft


def test_a_draft_that_does_not_fit_is_refused(writer: TextGenerator) -> None:
    with pytest.raises(UserError, match=r"^--draft: the iteration schedule 1,2,3 is for 3 layers"):
        TextGenerator(writer.checkpoint, drafting=Drafting(draft="1,2,3"))
    last = TextGenerator(writer.checkpoint, drafting=Drafting(draft="0"))
    with pytest.raises(UserError, match="drafts need kv_strategy='exact', got 'last'"):
        last.stream("abc", replace(FEW, kv_strategy="last"))


def test_what_drafts_did_is_noted(writer: TextGenerator, tmp_path: Path) -> None:
    notes = Notes()
    for prompts in (["abc def"], ["abc def", "a"]):
        common: dict[str, Any] = {
            "workspace": tmp_path,
            "model": writer.checkpoint,
            "progress": notes,
        }
        options = {**common, "sampling": FEW, "drafting": Drafting(draft="2,1", num_tokens=3)}
        if len(prompts) == 1:
            assert "".join(generating.generate_stream(prompts[0], **options))
        else:
            assert len(generating.generate(prompts, **options)) == 2
    assert len(notes.texts) == 2
    for text in notes.texts:
        assert re.search(r"^100.0% of \d+ drafted tokens accepted, \d\.\d\d tokens per ver", text)


def test_text_ends_before_the_stop_token(writer: TextGenerator) -> None:
    ids = [writer.text.prefix_id, *writer.text.tokenizer.encode("abc def").ids]
    tokens = generate(writer.decoder, torch.tensor([ids]), max_new_tokens=8)[0, len(ids) :].tolist()
    stop = next(
        t for t in tokens[1:] if t != tokens[0] and writer.text.tokenizer.decode([t]).isascii()
    )
    expected = writer.text.tokenizer.decode(tokens[: tokens.index(stop)])
    sampling = replace(FEW, stop=(writer.text.tokenizer.decode([stop]),))
    assert "".join(writer.stream("abc def", sampling)) == expected


def test_a_stop_text_may_span_tokens(writer: TextGenerator) -> None:
    sampled = replace(FEW, temperature=1.0, seed=5)
    whole = "".join(writer.stream("abc def", sampled))
    for size in (2, 3, 4):
        stop = whole[len(whole) // 2 :][:size]
        assert len(writer.text.encode(stop, add_special_tokens=False)) > 1
        sampling = replace(sampled, stop=("not there", "", stop))
        pieces = list(writer.stream("abc def", sampling))
        assert "".join(pieces) == whole[: whole.index(stop)]
        assert writer.continue_all(["abc def"], sampling) == ["".join(pieces)]


def test_what_may_begin_a_stop_text_is_held_back(writer: TextGenerator) -> None:
    ids = writer.text.tokenizer.encode("a b c").ids
    text = [writer.text.decode([token]) for token in ids]
    assert list(writer._pieces(ids, [f"{text[-1]}d"])) == [*text[:-1], text[-1]]
    held = list(writer._pieces(ids, [f"{text[-2]}{text[-1]}d"]))
    assert held == [*text[:-2], text[-2] + text[-1]]


def test_characters_come_whole(writer: TextGenerator) -> None:
    ids = writer.text.tokenizer.encode("é 好 你").ids
    pieces = list(writer._pieces(ids, ()))
    assert "".join(pieces) == "é 好 你"
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("prompt", ["abc", "a long prompt, it is, and no end of it"])
def test_without_a_number_the_continuation_fills_the_context(
    writer: TextGenerator, prompt: str
) -> None:
    place = writer.decoder.config.context_length - len(writer.text.encode_document(prompt))
    assert 0 < place < generating.USUAL_NEW_TOKENS
    given = Sampling(max_new_tokens=place)
    text = "".join(writer.stream(prompt, given))
    assert "".join(writer.stream(prompt, Sampling())) == text
    assert writer.continue_all([prompt, "a"], Sampling()) == writer.continue_all(
        [prompt, "a"], given
    )
    assert Sampling().limited(500).max_new_tokens == generating.USUAL_NEW_TOKENS


def test_a_prompt_that_leaves_no_place_is_refused(writer: TextGenerator) -> None:
    prompt = "xq " * writer.decoder.config.context_length
    with pytest.raises(UserError, match="do not fit the context_length of 32"):
        writer.stream(prompt, Sampling())
    with pytest.raises(UserError, match="do not fit the context_length of 32"):
        writer.continue_all([prompt, "abc"], Sampling())


def test_no_prompt_is_refused(writer: TextGenerator) -> None:
    with pytest.raises(UserError, match="nothing to continue"):
        writer.continue_all([], FEW)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_new_tokens": 500}, "context_length of 32"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    writer: TextGenerator, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        writer.stream("abc", replace(FEW, **change))


def test_another_schedule_writes_as_that_model_does(
    writer: TextGenerator, tiny_tokens: Path, tmp_path: Path
) -> None:
    none = IterationSchedule((0, 0))
    checkpoint = write(writer.decoder, tmp_path, tiny_tokens)
    pruned = TextGenerator(checkpoint, none)
    assert pruned.decoder.schedule == none
    with pytest.raises(UserError, match="layers"):
        TextGenerator(checkpoint, IterationSchedule((0, 0, 0)))
