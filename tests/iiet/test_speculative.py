"""Speculative decoding generates what plain decoding does, whatever drafts, in any batch."""

import copy
import functools

import pytest
import torch
from model_cases import left_padding, make_model, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from iiet import Decoder, IterationSchedule, preset
from iiet.decoding.speculative import DraftRecord, draft_models, step_costs
from iiet.model.cache import KeyValueCache

PROMPTS = tokens(3, 6)
PADDED = {"attention_mask": left_padding(0, 2, 4, time=6), "max_new_tokens": 16}


@functools.cache
def decoder_of(schedule=(2, 0, 1), method="iiet"):
    return make_model(method, schedule, seed=3, num_kv_heads=4, context_length=128)


def drafts(draft, draft_tokens="auto"):
    return {"draft": draft, "draft_tokens": draft_tokens}


def plain_and_drafted(decoder, drafting, *, max_new_tokens):
    """Return what plain and speculative decoding generate after a prompt, and the record."""
    ids = PROMPTS[:1]
    expected = decoder.generate(ids, max_new_tokens=max_new_tokens)
    return expected, *drafted(decoder, ids, **drafting, max_new_tokens=max_new_tokens)


def drafted(decoder, ids, **options):
    """Return what speculative decoding generates, and the record."""
    record = DraftRecord()
    return decoder.generate(ids, record=record, **options), record


@pytest.fixture(scope="module")
def plain_tokens():
    """What plain decoding generates after the padded prompts."""
    return decoder_of().generate(PROMPTS, **PADDED)


@pytest.mark.parametrize("draft", ["0", "2,0,0", "0,0,1", "2,0,1", "2,1,1", "3,0,0"])
def test_the_tokens_are_those_of_plain_decoding(draft, plain_tokens):
    """Drafts within the schedule, equal to it, and with more corrections."""
    generated, record = drafted(decoder_of(), PROMPTS, **drafts(draft, 3), **PADDED)
    assert torch.equal(plain_tokens, generated)
    assert 0 < record.acceptance <= 1
    assert (record.acceptance == 1) == (draft == "2,0,1")


@pytest.mark.parametrize(("draft", "draft_tokens"), [("0", 1), ("own", 3)])
def test_a_batch_keeps_what_its_slowest_row_accepts(draft, draft_tokens):
    """With its own cache, a draft reads again what verification replaced."""
    decoder = decoder_of()
    options = {
        "max_new_tokens": 50 if draft_tokens == 1 else 32,  # The share below needs more.
        "draft_tokens": draft_tokens,
        "draft": decoder_of((1, 0, 0)) if draft == "own" else draft,
    }
    row_records = [drafted(decoder, row, **options)[1] for row in PROMPTS.split(1)]
    _, batch_record = drafted(decoder, PROMPTS, **options)
    slowest = min(record.tokens_per_verification for record in row_records)
    assert 1 < batch_record.tokens_per_verification < slowest
    if draft_tokens == 1:  # Each position counts once.
        share = sum(r.accepted for r in row_records) / sum(r.drafted for r in row_records)
        assert batch_record.acceptance == pytest.approx(share, abs=0.1)


def test_the_record_is_that_of_a_plain_loop():
    """A draft that reads whole texts anew; a row's tokens count up to its first that differs."""
    draft = decoder_of((1, 0, 0))
    tokens_in_all = PROMPTS.size(1) + 24
    expected = decoder_of().generate(PROMPTS, max_new_tokens=24)
    _, record = drafted(decoder_of(), PROMPTS, max_new_tokens=24, **drafts(draft, 3))

    plain = DraftRecord()
    length = PROMPTS.size(1) + 1  # The first token comes with the prompt's pass.
    while (count := min(3, tokens_in_all - length - 1)) > 0:
        proposed = draft.generate(expected[:, :length], max_new_tokens=count)[:, length:]
        is_equal = proposed == expected[:, length : length + count]
        num_equal = [([*row, False]).index(False) for row in is_equal.tolist()]
        num_new = min(num_equal) + 1
        plain.drafted += proposed.numel()
        plain.accepted += sum(num_equal)
        plain.verifications += len(PROMPTS)
        plain.verified += num_new * len(PROMPTS)
        length += num_new
    counts = ("drafted", "accepted", "verifications", "verified")
    assert [getattr(record, name) for name in counts] == [getattr(plain, name) for name in counts]


def test_end_tokens_end_rows_as_in_plain_decoding(plain_tokens):
    decoder = decoder_of()
    for stops in (
        [int(plain_tokens[0, 9]), int(plain_tokens[1, 16])],
        plain_tokens[:, 12].tolist(),
    ):
        expected = decoder.generate(PROMPTS, eos_token_id=stops, **PADDED)
        for draft in ("0", "3,0,0"):
            generated, _ = drafted(
                decoder, PROMPTS, eos_token_id=stops, **drafts(draft, 4), **PADDED
            )
            assert torch.equal(expected, generated)


def test_decoding_is_plain_from_where_no_draft_pays():
    """A draft of other weights: few of its tokens are kept, and each costs half a step."""
    decoder = decoder_of()
    unrelated = decoder_of((0, 0), "vanilla")
    expected, generated, record = plain_and_drafted(decoder, drafts(unrelated), max_new_tokens=60)
    assert torch.equal(expected, generated)
    assert record.acceptance < 0.5
    assert 0 < record.verifications < 20
    assert record.plain_steps > 40


def test_auto_keeps_the_best_of_its_drafts():
    """Each draft is measured on a few tokens first; the family has one that equals the model."""
    decoder = decoder_of((3, 3, 3))
    family = [IterationSchedule.parse(text, num_layers=3) for text in ("0", "3,3,2", "1,0,0")]
    expected, generated, record = plain_and_drafted(
        decoder, {**drafts("auto", 4), "family": family}, max_new_tokens=100
    )
    assert torch.equal(expected, generated)
    assert set(record.rounds_by_draft) == {str(schedule) for schedule in family}
    rounds = sorted(record.rounds_by_draft.values())
    assert rounds[1] <= 16
    assert rounds[2] > sum(rounds[:2])


def test_drafts_share_the_cache_only_within_the_schedule(monkeypatch):
    num_caches = 0
    initialize = KeyValueCache.__init__

    def counted(self, *arguments, **options):
        nonlocal num_caches
        num_caches += 1
        initialize(self, *arguments, **options)

    monkeypatch.setattr(KeyValueCache, "__init__", counted)
    for draft, expected in (("0", 1), ("1,0,1", 1), ("0,1,0", 2), ("auto", 1)):
        num_caches = 0
        decoder_of().generate(PROMPTS, max_new_tokens=12, draft=draft)
        assert num_caches == expected


def test_the_stream_is_plain_tensors_and_the_same_twice():
    decoder = decoder_of()
    record = DraftRecord()
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 2, "draft": "0"}
    steps = list(decoder.stream(PROMPTS, record=record, **options))
    assert [step.shape for step in steps] == [(3,)] * 20
    ids, second_record = drafted(decoder, PROMPTS, **options)
    assert torch.equal(torch.stack(steps, 1), ids[:, 6:])
    assert record == second_record
    decoder(ids).sum().backward()


def test_the_number_of_drafted_tokens_follows_the_acceptance():
    """A draft that says nearly what the model says drafts many tokens, one of other weights few."""
    decoder = decoder_of((0,) * 8, "vanilla").copy()
    for parameter in decoder.model.layers[1:].parameters():
        parameter.data.mul_(0.01)
    good = decoder_of((0,), "vanilla").copy()
    poor = copy.deepcopy(good)
    good.load_state_dict(decoder.state_dict(), strict=False)
    torch.nn.init.normal_(poor.model.embed_tokens.weight)
    per_round = []
    for draft in (good, poor):
        _, record = drafted(decoder, PROMPTS[:1], max_new_tokens=50, draft=draft)
        per_round.append(record.drafted / record.verifications)
    assert per_round[0] > 2 * per_round[1]


def test_a_gpu_drafts_only_what_is_asked_for():
    """Shown with a pretended GPU, as `auto` decides by the device of the weights alone."""
    decoder = Decoder(preset("tiny", num_layers=2, schedule=1))
    assert list(draft_models(decoder, "auto", num_tokens=8)) == ["0,0"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder.model.embed_tokens.weight = nn.Parameter(torch.empty(8, 8, device="cuda"))
    assert decoder.device.type == "cuda"
    assert draft_models(decoder, "auto", num_tokens=8) == {}
    assert list(draft_models(decoder, "0", num_tokens=8)) == ["0,0"]


def test_a_drafts_step_costs_the_bytes_and_flops_that_it_reads_of_the_model():
    """Counted by hand: four bytes a value; a CPU does two FLOPs while it reads a byte."""
    decoder = decoder_of((3, 3, 3), "iiet")
    draft = decoder.with_schedule(0)
    matrices = 4 * 16 * 16 + 3 * 16 * 24  # of a field; the norms have 2 * 16 values
    head = 31 * 16
    per_evaluation = {}
    for num_tokens in (8, 128):
        keys_and_values = num_tokens * 2 * 16
        flops = 2 * matrices + 4 * 16 * num_tokens
        per_evaluation[num_tokens] = 4 * (matrices + 2 * 16 + keys_and_values) + flops / 2
    for num_tokens, evaluation in per_evaluation.items():
        ends = 4 * (head + 2 * 16) + 2 * head / 2
        costs = step_costs(decoder, draft, batch_size=1, num_tokens=num_tokens)
        expected = (3 * evaluation + ends) / (12 * evaluation + ends)
        assert costs[0] == pytest.approx(expected, rel=0.01)


class RightInTheFirstRow(Decoder):
    """A cheap draft that knows the tokens of the first row, and says no right one in the others."""

    def forward(self, *arguments, cache, **options):
        super().forward(*arguments, cache=cache, **options)
        next_tokens = self.known_tokens[:, cache.get_seq_length()]
        logits = nn.functional.one_hot(next_tokens, self.config.vocab_size).double()
        return torch.cat([logits[:1], -logits[1:]]).unsqueeze(1)


def test_a_batch_gives_up_a_draft_that_one_of_its_rows_never_accepts():
    decoder = decoder_of()
    draft = RightInTheFirstRow(decoder_of((0,), "vanilla").config).double().eval()
    for num_rows, accepts in ((1, True), (2, False)):
        prompts = PROMPTS[:num_rows]
        draft.known_tokens = decoder.generate(prompts, max_new_tokens=40)
        generated, record = drafted(decoder, prompts, max_new_tokens=40, draft=draft)
        assert torch.equal(generated, draft.known_tokens)
        assert (record.acceptance == 1) == accepts
        assert (record.plain_steps < record.verifications) == accepts
